"""Training data: rows of six formats, in files of five kinds or on the Hugging Face hub, as conversations.

    chat                {"messages": [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Hello."}]}
    ShareGPT            {"conversations": [{"from": "human", "value": "Hi?"}, {"from": "gpt", "value": "Hello."}]}
    Alpaca              {"instruction": "Translate.", "input": "wasserdicht", "output": "waterproof"}
    prompt/completion   {"prompt": "Is it waterproof?", "completion": "Yes, IP67."}
    plain text          {"text": "It was a dark and stormy night ..."}
    preference pair     {"prompt": "Is it waterproof?", "chosen": "Yes, IP67.", "rejected": "No idea."}

`formats` has the table, and one file here reads each. `edgelora.rows` knows the files, `source` what is given on the
command line (`b.jsonl@0.5`), `reading` makes conversations of all that is given.
"""

from edgelora.dataset.formats import FORMATS, Format, conversation_of, format_of
from edgelora.dataset.reading import Given, RowReader, read_conversations, sources_of
from edgelora.dataset.source import DataSource, data_sha256

__all__ = [
    "FORMATS",
    "DataSource",
    "Format",
    "Given",
    "RowReader",
    "conversation_of",
    "data_sha256",
    "format_of",
    "read_conversations",
    "sources_of",
]
