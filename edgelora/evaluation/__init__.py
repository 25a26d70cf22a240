"""`edgelora eval`: a base, adapters on it and other quantizations of it, side by side on rows with known answers.

rows.py             what is asked, and what the right answer is
variants.py         what answers: a base, or an adapter on it, each beside what it is compared with
settings.py         how the replies are written
answers.py          replies and likelihoods of every row, by the engine; none of them twice
work_file.py        where they are kept between runs
metrics.py          the table of metrics: what each makes of an answer
text_overlap.py     exact match, contains, token F1, ROUGE-L
json_fields.py      JSON validity and field accuracy
labels.py           classification: accuracy and confusions
pattern.py          regular expressions
own_function.py     a metric that is the user's own Python function
judge.py            a model that judges, behind any OpenAI-compatible endpoint; judge_client.py asks it
divergence.py       what another quantization changes in the distribution of every token
bootstrap.py        confidence intervals, of a value and of a difference
comparison.py       better, worse, same: by row, and with the interval of the difference
thresholds.py       what a CI run insists on
evaluate.py         all of it in one run
results.py          what a run found, as JSON and on the screen
report.py           the page; report.html is its template
text_perplexity.py  perplexity on a plain text, as llama-perplexity measures it
quant_sweep.py      `edgelora fit`: which quantization is worth its memory
"""
