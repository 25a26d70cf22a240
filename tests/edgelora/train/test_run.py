"""Whole runs of the real trainer on a tiny random Llama."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from converters.errors import DownloadError
from edgelora.contract import Contract
from edgelora.errors import DataFileError, EdgeloraError, MissingExtraError, ModelFileError, SettingsError
from edgelora.messages import Conversation
from edgelora.template import BUILTIN, ChatTemplate
from edgelora.train import Recipe, TrainReport, TrainStatus, train
from edgelora.train.base import BaseFolder, find_base
from edgelora.train.folder import RunFolder

from .conftest import Watcher, chat, make_base, read_metrics, write_rows

pytestmark = [
    pytest.mark.train,
    # PEFT 0.21 asks transformers 5.23 for it by its old name.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]

# The same arithmetic in the same order on the CPU: only decimals lost in the JSON of a checkpoint could differ.
SAME_RUN = 1e-6
# Float32 logits of one small model, computed twice through different module wrappers.
SAME_LOGITS = 1e-5
# A learning rate of 1e-2 for six steps moves every B away from zero by far more than this.
MOVED = 1e-3


@dataclass(frozen=True)
class Finished:
    folder: Path
    report: TrainReport
    watcher: Watcher


@pytest.fixture(scope="module")
def settings() -> Recipe:
    return Recipe(
        rank=4,
        alpha=8,
        learning_rate=1e-2,
        max_steps=6,
        batch_size=2,
        gradient_accumulation=2,
        logging_steps=1,
        save_steps=2,
    )


@pytest.fixture(scope="module")
def finished(base: Path, data: Path, settings: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """An uninterrupted run of six steps; tests copy it before they change it."""
    folder, watcher = tmp_path_factory.mktemp("run") / "adapter", Watcher()
    report = train(data, str(base), folder, settings, eval_data=data, progress=watcher)
    return Finished(folder, report, watcher)


def weights(folder: Path) -> Mapping[str, Any]:
    from safetensors.torch import load_file

    tensors: Mapping[str, Any] = load_file(folder / "adapter_model.safetensors")
    return tensors


def largest_difference(one: Mapping[str, Any], other: Mapping[str, Any]) -> float:
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def logits(model: Any) -> Any:
    import torch

    with torch.no_grad():
        return model.eval()(torch.arange(40).reshape(2, 20)).logits


def load_base(base: Path) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)


class TestAFinishedRun:
    def test_is_a_peft_folder_that_changes_the_base(self, finished: Finished, base: Path) -> None:
        from peft import PeftModel

        bare = logits(load_base(base))
        adapted = PeftModel.from_pretrained(load_base(base), finished.folder)
        assert float((logits(adapted) - bare).abs().max()) > MOVED
        assert float((logits(adapted.merge_and_unload()) - bare).abs().max()) > MOVED
        config = json.loads((finished.folder / "adapter_config.json").read_text())
        assert (config["r"], config["lora_alpha"], config["peft_type"]) == (4, 8, "LORA")
        assert config["base_model_name_or_path"] == str(base)

    def test_gives_the_logits_of_the_last_checkpoint(self, finished: Finished, base: Path) -> None:
        from peft import PeftModel

        last, earlier = finished.folder / "checkpoints/checkpoint-6", finished.folder / "checkpoints/checkpoint-4"
        final = logits(PeftModel.from_pretrained(load_base(base), finished.folder))
        assert float((logits(PeftModel.from_pretrained(load_base(base), last)) - final).abs().max()) < SAME_LOGITS
        assert float((logits(PeftModel.from_pretrained(load_base(base), earlier)) - final).abs().max()) > SAME_LOGITS

    def test_adapts_every_linear_layer_and_moved_every_b(self, finished: Finished) -> None:
        found = weights(finished.folder)
        assert len(found) == 2 * 7 * 2  # A and B of seven matrices in two layers
        for name, tensor in found.items():
            assert float(tensor.abs().max()) > MOVED, name

    def test_left_the_base_alone(self, base: Path, data: Path, settings: Recipe, tmp_path: Path) -> None:
        before = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in base.iterdir()}
        train(data, str(base), tmp_path / "out", replace(settings, max_steps=1))
        assert {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in base.iterdir()} == before

    def test_holds_nothing_unfinished(self, finished: Finished) -> None:
        names = {p.name for p in finished.folder.iterdir()}
        adapter = {"adapter_config.json", "adapter_model.safetensors", "edgelora.json"}
        wanted = adapter | {"run.json", "metrics.jsonl", "checkpoints", "report.json", "report.html"}
        assert wanted <= names <= wanted | {"train.log"}
        assert sorted(p.name for p in (finished.folder / "checkpoints").iterdir()) == ["checkpoint-4", "checkpoint-6"]

    @pytest.mark.skipif(os.name != "posix", reason="permissions are POSIX's")
    def test_its_files_can_be_read_like_any_new_file(self, finished: Finished, tmp_path: Path) -> None:
        (tmp_path / "new").touch()
        usual = stat.S_IMODE((tmp_path / "new").stat().st_mode)
        files = [p for p in finished.folder.rglob("*") if p.is_file()]
        assert {p.name for p in files} >= {"adapter_model.safetensors", "optimizer.pt"}
        assert {p.name: stat.S_IMODE(p.stat().st_mode) for p in files} == {p.name: usual for p in files}

    def test_says_what_the_method_becomes_before_it_trains(self, finished: Finished) -> None:
        assert "lora: becomes a GGUF adapter, exactly" in finished.watcher.notes

    def test_has_a_contract(self, finished: Finished, base: Path, data: Path, tokenizer: Any) -> None:
        from converters.fingerprint import fingerprint

        contract = Contract.load(finished.folder)
        assert contract is not None
        assert contract.base_name == base.name
        assert contract.base_fingerprint == fingerprint(base) == finished.report.base_fingerprint
        assert contract.chat_template == BUILTIN["chatml"]
        text = ChatTemplate(contract.chat_template).render(contract.golden_messages, add_generation_prompt=True)
        assert text.endswith("<|im_start|>assistant\n")
        assert list(contract.golden_tokens) == tokenizer(text, add_special_tokens=False)["input_ids"]
        assert contract.stop == ()  # ChatML's end of turn is this tokenizer's end of sequence
        assert contract.system == "Be brief."
        training = contract.training
        assert (training["method"], training["rank"], training["alpha"], training["steps"]) == ("lora", 4, 8, 6)
        assert training["data_sha256"] == hashlib.sha256(data.read_bytes()).hexdigest()
        assert training["loss"] == finished.report.loss
        assert training["eval_loss"] == finished.report.eval_loss
        assert set(training["versions"]) == {"torch", "transformers", "peft", "trl"}

    def test_reports_each_step(self, finished: Finished) -> None:
        statuses = finished.watcher.statuses
        assert [(s.step, s.total_steps) for s in statuses] == [(n, 6) for n in range(1, 7)]
        assert statuses[-1].seconds_left == 0
        assert statuses[-1].eval_loss is not None
        assert all(s.steps_per_second > 0 for s in statuses)
        assert finished.report.steps == 6
        assert finished.report.rows == finished.report.eval_rows == 24

    def test_logs_metrics(self, finished: Finished) -> None:
        lines = read_metrics(finished.folder)
        steps, evaluations = [x for x in lines if "loss" in x], [x for x in lines if "eval_loss" in x]
        assert [line["step"] for line in steps] == [1, 2, 3, 4, 5, 6]
        assert [line["step"] for line in evaluations] == [2, 4, 6]
        for line, status in zip(steps, finished.watcher.statuses, strict=True):
            assert line["loss"] == pytest.approx(status.loss, abs=SAME_RUN)
            assert line["learning_rate"] == pytest.approx(status.learning_rate)
            assert {"epoch", "grad_norm", "token_accuracy", "seconds", "steps_per_second"} <= line.keys()
        assert steps[-1]["loss"] < steps[0]["loss"]

    def test_says_nothing_on_the_screen(
        self, base: Path, data: Path, settings: Recipe, tmp_path: Path, capfd: pytest.CaptureFixture[str]
    ) -> None:
        train(data, str(base), tmp_path / "out", replace(settings, max_steps=1), eval_data=data)
        assert capfd.readouterr() == ("", "")


def test_only_labelled_tokens_give_loss(base: Path, tokenizer: Any, tmp_path: Path, settings: Recipe) -> None:
    """What reaches the model, caught in the trainer's own collated batches."""
    import torch

    from edgelora.train.base import find_base, placement
    from edgelora.train.data import finder_for, tokenize_conversations
    from edgelora.train.trainee import begin
    from edgelora.train.trainer import build_trainer

    turns = (chat("Is it red?", "Yes.", "Sure?", "Yes, it is red."), chat("Hi", "Hello!"))
    talks = [Conversation(tuple(messages), "data.jsonl:1") for messages in turns]
    rows = tokenize_conversations(talks, tokenizer, finder_for(tokenizer, ChatTemplate(BUILTIN["chatml"])), 512)
    settings = replace(settings, dropout=0.0)
    place = placement(settings)
    folder = RunFolder(tmp_path)
    model = begin(find_base(str(base)).load_model(place), find_base(str(base)), settings, {}, folder, lambda: [])
    trainer, _ = build_trainer(model, tokenizer, rows, None, settings, place, folder, Watcher())
    batch = next(iter(trainer.get_train_dataloader()))
    texts = {tokenizer.decode(labels[labels != -100]) for labels in batch["labels"]}
    assert texts == {"Yes.<|im_end|>Yes, it is red.<|im_end|>", "Hello!<|im_end|>"}
    trainer.model.eval()
    loss = trainer.compute_loss(trainer.model, dict(batch)).item()
    scores = torch.nn.functional.log_softmax(logits_of(trainer.model, batch)[:, :-1], dim=-1)
    wanted = batch["labels"][:, 1:]
    places = (wanted != -100).nonzero().tolist()
    by_hand = [-scores[row, at, wanted[row, at]] for row, at in places]
    everywhere = torch.nn.functional.cross_entropy(scores.flatten(0, 1), batch["input_ids"][:, 1:].flatten())
    assert loss == pytest.approx(float(torch.stack(by_hand).mean()), abs=SAME_LOGITS)
    assert loss != pytest.approx(float(everywhere), abs=SAME_LOGITS)


def logits_of(model: Any, batch: Mapping[str, Any]) -> Any:
    import torch

    with torch.no_grad():
        return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits


def test_the_same_seed_gives_the_same_adapter_and_another_does_not(
    finished: Finished, base: Path, data: Path, settings: Recipe, tmp_path: Path
) -> None:
    train(data, str(base), tmp_path / "same", settings)
    train(data, str(base), tmp_path / "other", replace(settings, seed=7))
    assert largest_difference(weights(finished.folder), weights(tmp_path / "same")) < SAME_RUN
    assert largest_difference(weights(finished.folder), weights(tmp_path / "other")) > MOVED


def test_epochs_and_checkpointed_activations(
    finished: Finished, base: Path, data: Path, settings: Recipe, tmp_path: Path
) -> None:
    half = replace(settings, max_steps=None, epochs=0.5, gradient_checkpointing=True)
    assert train(data, str(base), tmp_path / "half", half).steps == 3  # 24 rows, 4 at a step
    whole = replace(settings, gradient_checkpointing=True)
    train(data, str(base), tmp_path / "whole", whole)
    assert largest_difference(weights(finished.folder), weights(tmp_path / "whole")) < SAME_RUN


class TestResume:
    def stop_after(self, step: int) -> Callable[[TrainStatus], None]:
        def update(status: TrainStatus) -> None:
            if status.step == step:
                signal.raise_signal(signal.SIGINT)

        return update

    def test_ctrl_c_keeps_a_checkpoint_and_the_rest_of_the_run_is_the_same(
        self, finished: Finished, base: Path, data: Path, settings: Recipe, tmp_path: Path
    ) -> None:
        out, watcher = tmp_path / "out", Watcher(self.stop_after(3))
        with pytest.raises(KeyboardInterrupt, match=r"^Step 3 of 6 is kept; go on with --resume\.$"):
            train(data, str(base), out, settings, eval_data=data, progress=watcher)
        assert RunFolder(out).checkpoint_steps() == [2, 3]
        assert not (out / "adapter_config.json").exists()
        assert not any("is kept" in note for note in watcher.notes)  # who catches it says it
        with pytest.raises(SettingsError, match=r"unfinished run .*step 3") as caught:
            train(data, str(base), out, settings, eval_data=data)
        assert "--resume" in caught.value.hint

        report = train(data, str(base), out, settings, eval_data=data, resume=True)
        assert "going on after step 3" in report.notes
        assert report.steps == 6
        self.assert_same(finished, out)

    def test_a_killed_run_goes_on_from_its_last_whole_checkpoint(
        self, finished: Finished, base: Path, data: Path, settings: Recipe, tmp_path: Path
    ) -> None:
        out = tmp_path / "out"
        shutil.copytree(finished.folder, out)
        for name in ("adapter_config.json", "adapter_model.safetensors", "edgelora.json"):
            (out / name).unlink()
        (out / "checkpoints/checkpoint-6").rename(out / "checkpoints/.partial-6")  # killed while it was written
        with open(out / "metrics.jsonl", "a") as file:
            file.write('{"step": 6, "lo')
        report = train(data, str(base), out, settings, eval_data=data, resume=True)
        assert "going on after step 4" in report.notes
        assert not list((out / "checkpoints").glob(".partial*"))
        self.assert_same(finished, out)

    def assert_same(self, finished: Finished, out: Path) -> None:
        assert largest_difference(weights(finished.folder), weights(out)) < SAME_RUN
        expected, found = read_metrics(finished.folder), read_metrics(out)
        assert [(line["step"], "loss" in line) for line in found] == [(x["step"], "loss" in x) for x in expected]
        for one, other in zip(expected, found, strict=True):
            for name in one.keys() & {"loss", "eval_loss", "learning_rate", "grad_norm"}:
                assert one[name] == pytest.approx(other[name], abs=SAME_RUN), (name, one["step"])

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda r, base, data: (replace(r, rank=8, learning_rate=1e-3), base, data), "rank was 4, now 8; learning"),
            (lambda r, base, data: (r, base, data.parent / "other.jsonl"), "training data is not the same"),
            (lambda r, base, data: (r, base.parent / "other", data), "base was .*, now .*"),
        ],
        ids=["recipe", "data", "base"],
    )
    def test_another_recipe_base_or_data_is_refused(
        self, change: Any, message: str, finished: Finished, base: Path, data: Path, settings: Recipe, tmp_path: Path
    ) -> None:
        write_rows(data.parent / "other.jsonl", [{"prompt": "Hi", "completion": "Hello!"}])
        if not (base.parent / "other").exists():
            make_base(base.parent / "other", chat_template=BUILTIN["chatml"], norms=2.0)
        recipe, other_base, other_data = change(settings, base, data)
        out = tmp_path / "out"
        shutil.copytree(finished.folder, out)
        with pytest.raises(SettingsError, match=message):
            train(other_data, str(other_base), out, recipe, eval_data=data, resume=True)
        # the twin: with nothing changed but how often it is logged, it is not refused
        report = train(data, str(base), out, replace(settings, logging_steps=3), eval_data=data, resume=True)
        assert report.notes == ("already finished: nothing to do",)
        assert (report.steps, report.loss, report.rows) == (6, finished.report.loss, 24)

    def test_weights_that_are_gone_are_saved_again_from_the_last_checkpoint(
        self, finished: Finished, base: Path, data: Path, settings: Recipe, tmp_path: Path
    ) -> None:
        out = tmp_path / "out"
        shutil.copytree(finished.folder, out)
        (out / "adapter_model.safetensors").unlink()
        report = train(data, str(base), out, settings, eval_data=data, resume=True)
        assert (report.steps, report.loss) == (6, finished.report.loss)
        self.assert_same(finished, out)
        contract = Contract.load(out)
        assert contract is not None
        assert "steps_per_second" not in contract.training
        again = train(data, str(base), out, settings, eval_data=data, resume=True)
        assert (again.notes, again.steps_per_second) == (("already finished: nothing to do",), 0.0)

    def test_ctrl_c_after_the_last_step_says_what_is_kept(
        self, finished: Finished, base: Path, data: Path, settings: Recipe, tmp_path: Path, monkeypatch: Any
    ) -> None:
        def interrupted(trainee: Any, folder: Path) -> None:
            if folder.name == ".partial-result":
                signal.raise_signal(signal.SIGINT)
            save(trainee, folder)

        import edgelora.train.result as module

        save = module.save_trained
        monkeypatch.setattr(module, "save_trained", interrupted)
        with pytest.raises(KeyboardInterrupt, match="Step 6 of 6 is kept; go on with --resume"):
            train(data, str(base), tmp_path / "out", settings, eval_data=data)
        monkeypatch.undo()
        train(data, str(base), tmp_path / "out", settings, eval_data=data, resume=True)
        self.assert_same(finished, tmp_path / "out")

    def test_another_template_text_or_type_is_refused_and_other_libraries_are_noted(
        self, base: Path, data: Path, settings: Recipe, tmp_path: Path
    ) -> None:
        out, template = tmp_path / "out", tmp_path / "chat.jinja"
        template.write_text(BUILTIN["chatml"])
        named = replace(settings, chat_template=str(template))
        with pytest.raises(KeyboardInterrupt):
            train(data, str(base), out, named, progress=Watcher(self.stop_after(2)))
        template.write_text(BUILTIN["chatml"].replace("<|im_end|>", " <|im_end|>"))
        with pytest.raises(SettingsError, match="chat template is not the same"):
            train(data, str(base), out, named, resume=True)
        template.write_text(BUILTIN["chatml"])
        record = json.loads((out / "run.json").read_text())
        (out / "run.json").write_text(json.dumps({**record, "dtype": "bfloat16"}))
        with pytest.raises(SettingsError, match="weights were bfloat16, now float32"):
            train(data, str(base), out, named, resume=True)
        (out / "run.json").write_text(json.dumps({**record, "versions": {**record["versions"], "peft": "0.1"}}))
        notes = train(data, str(base), out, named, resume=True).notes
        assert any("not the libraries that the run began with: peft 0.1 is now" in note for note in notes)

    def test_two_processes_do_not_train_in_one_folder(
        self, finished: Finished, base: Path, data: Path, settings: Recipe, tmp_path: Path
    ) -> None:
        out = tmp_path / "out"
        shutil.copytree(finished.folder, out)
        with (
            RunFolder(out).locked(),
            pytest.raises(SettingsError, match="another process is training in this folder"),
        ):
            train(data, str(base), out, settings, eval_data=data, resume=True)
        assert train(data, str(base), out, settings, eval_data=data, resume=True).steps == 6
        assert not (out / ".lock").exists()

    def test_resume_with_nothing_there_begins(self, base: Path, data: Path, settings: Recipe, tmp_path: Path) -> None:
        assert train(data, str(base), tmp_path / "out", replace(settings, max_steps=1), resume=True).steps == 1


class TestTheOutputFolder:
    def test_a_finished_adapter_is_not_overwritten(
        self, finished: Finished, base: Path, data: Path, settings: Recipe
    ) -> None:
        before = (finished.folder / "adapter_model.safetensors").stat().st_mtime_ns
        with pytest.raises(SettingsError, match="holds a finished run"):
            train(data, str(base), finished.folder, settings)
        assert (finished.folder / "adapter_model.safetensors").stat().st_mtime_ns == before

    def test_other_files_are_not_touched(self, base: Path, data: Path, settings: Recipe, tmp_path: Path) -> None:
        (tmp_path / "thesis.txt").write_text("years of work")
        for output in (tmp_path, tmp_path / "thesis.txt"):
            with pytest.raises(SettingsError, match=r"not empty, and not a training run|a file, expected a folder"):
                train(data, str(base), output, settings)
        assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]

    def test_a_run_without_a_checkpoint_may_begin_again(
        self, finished: Finished, base: Path, data: Path, settings: Recipe, tmp_path: Path
    ) -> None:
        shutil.copy(finished.folder / "run.json", tmp_path)
        assert train(data, str(base), tmp_path, replace(settings, max_steps=1)).steps == 1

    @pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
    def test_a_full_disk_is_named(self, base: Path, data: Path, settings: Recipe, tmp_path: Path) -> None:
        def fill(status: TrainStatus) -> None:
            (tmp_path / "out/metrics.jsonl").unlink(missing_ok=True)
            (tmp_path / "out/metrics.jsonl").symlink_to("/dev/full")

        with pytest.raises(EdgeloraError, match="No space left on device") as caught:
            train(data, str(base), tmp_path / "out", settings, progress=Watcher(fill))
        assert str(tmp_path / "out") in caught.value.message
        assert not (tmp_path / "out/adapter_config.json").exists()


class TestBadInput:
    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("", "no rows"),
            (
                '{"messages": []}\n{"prompt": 1, "completion": "x"}\nnot json\n',
                r"rows.jsonl:1: .*\n.*rows.jsonl:2: .*\n.*rows.jsonl:3: not JSON",
            ),
            ('{"title": "Hi"}\n', r"rows.jsonl:1: expected `messages`, or .*, or `text`; found `title`"),
        ],
    )
    def test_bad_data(self, text: str, message: str, base: Path, settings: Recipe, tmp_path: Path) -> None:
        (tmp_path / "rows.jsonl").write_text(text)
        with pytest.raises(DataFileError, match=message):
            train(tmp_path / "rows.jsonl", str(base), tmp_path / "out", settings)
        assert not (tmp_path / "out").exists()

    def test_missing_data(self, base: Path, settings: Recipe, tmp_path: Path) -> None:
        with pytest.raises(DataFileError, match="No such file"):
            train(tmp_path / "rows.jsonl", str(base), tmp_path / "out", settings)
        with pytest.raises(DataFileError, match="standard input"):
            train(Path("-"), str(base), tmp_path / "out", settings)

    def test_bases_that_are_none(self, finished: Finished, data: Path, settings: Recipe, tmp_path: Path) -> None:
        (tmp_path / "model.gguf").write_bytes(b"GGUF")
        (tmp_path / "empty").mkdir()
        cases = {
            str(tmp_path / "model.gguf"): "model.gguf: 4 bytes is too short for a GGUF file",
            str(tmp_path / "gone"): "no such folder",
            str(tmp_path / "empty"): r"no config.json, no \*.safetensors, no tokenizer",
            str(finished.folder): "an adapter, not a base",
        }
        for name, message in cases.items():
            with pytest.raises(ModelFileError, match=message):
                train(data, name, tmp_path / "out", settings)

    def test_a_hub_id_without_a_network(
        self, data: Path, settings: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        import huggingface_hub.constants

        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        with pytest.raises(DownloadError, match="nor is it in the cache") as caught:
            train(data, "nobody/no-such-model", tmp_path / "out", settings)
        assert "folder" in caught.value.hint

    def test_weights_that_are_missing_or_cut(self, base: Path, data: Path, settings: Recipe, tmp_path: Path) -> None:
        from safetensors.torch import load_file, save_file

        from edgelora.train.base import find_base, placement

        shutil.copytree(base, tmp_path / "missing")
        file = tmp_path / "missing/model.safetensors"
        tensors = load_file(file)
        dropped = sorted(tensors)[-1]
        save_file({name: t for name, t in tensors.items() if name != dropped}, file, {"format": "pt"})
        with pytest.raises(ModelFileError, match=f"1 weights are missing: {dropped}"):
            find_base(str(tmp_path / "missing")).load_model(placement(settings))
        file.write_bytes(file.read_bytes()[:-100])
        with pytest.raises(ModelFileError, match="cannot be loaded"):
            find_base(str(tmp_path / "missing")).load_model(placement(settings))

    def test_a_base_without_a_template(self, data: Path, settings: Recipe, tmp_path: Path) -> None:
        bare = make_base(tmp_path / "bare", chat_template=None)
        with pytest.raises(SettingsError, match="no chat template") as caught:
            train(data, str(bare), tmp_path / "out", settings)
        assert "chatml" in caught.value.hint
        plain = write_rows(tmp_path / "plain.jsonl", [{"prompt": "Is it red? ", "completion": "Yes."}])
        train(plain, str(bare), tmp_path / "plain", replace(settings, max_steps=1))
        train(data, str(bare), tmp_path / "named", replace(settings, max_steps=1, chat_template="llama2"))
        for name, template in (("plain", "plain"), ("named", "llama2")):
            contract = Contract.load(tmp_path / name)
            assert contract is not None
            assert contract.chat_template == BUILTIN[template]

    def test_a_rank_above_what_a_matrix_can_hold_is_noted(
        self, finished: Finished, base: Path, data: Path, settings: Recipe, tmp_path: Path
    ) -> None:
        report = train(data, str(base), tmp_path / "out", replace(settings, rank=17, max_steps=1))
        assert any(n.startswith("rank 17 is more than k_proj, v_proj can hold (k_proj: 16)") for n in report.notes)
        assert not any("can hold" in note for note in finished.report.notes)

    def test_names_of_bases(self, base: Path, tmp_path: Path) -> None:
        snapshot = tmp_path / "models--some-owner--Tiny-1B-v2/snapshots/0123abcd"
        shutil.copytree(base, snapshot)
        assert find_base(str(base)).name == base.name
        assert find_base(str(snapshot)).name == "some-owner/Tiny-1B-v2"
        assert BaseFolder(snapshot, "some-owner/Tiny-1B-v2").name == "some-owner/Tiny-1B-v2"

    def test_target_modules_the_base_does_not_have(
        self, base: Path, data: Path, settings: Recipe, tmp_path: Path
    ) -> None:
        with pytest.raises(SettingsError, match=r"does not have: query, lm_head$") as caught:
            train(data, str(base), tmp_path / "out", replace(settings, target_modules="q_proj,query,lm_head"))
        assert "down_proj, gate_proj, k_proj" in caught.value.hint
        some = replace(settings, target_modules="q_proj, self_attn.v_proj", max_steps=1)
        train(data, str(base), tmp_path / "some", some)
        assert {name.split(".")[-3] for name in weights(tmp_path / "some")} == {"q_proj", "v_proj"}

    def test_a_device_that_is_not_there(self, base: Path, data: Path, settings: Recipe, tmp_path: Path) -> None:
        import torch

        if torch.cuda.is_available():
            pytest.skip("there is a CUDA device here")
        with pytest.raises(SettingsError, match="device is 'cuda'"):
            train(data, str(base), tmp_path / "out", replace(settings, device="cuda"))

    def test_a_loss_that_is_no_number_stops_the_run(self, data: Path, settings: Recipe, tmp_path: Path) -> None:
        broken = make_base(tmp_path / "broken", norms=float("inf"))
        with pytest.raises(EdgeloraError, match=r"the loss became nan at step 1 of 6") as caught:
            train(data, str(broken), tmp_path / "out", settings)
        assert "--learning-rate" in caught.value.hint

    def test_a_missing_extra(
        self, base: Path, data: Path, settings: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for name in ("peft", "trl"):
            monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(MissingExtraError, match="not installed: peft, trl") as caught:
            train(data, str(base), tmp_path / "out", settings)
        assert caught.value.hint == "pip install 'edgelora[train]'"
        assert caught.value.exit_code == 5


PROGRAM = """
import sys
from pathlib import Path
from edgelora.train import Recipe, train

class Steps:
    def note(self, text): print("note", text, flush=True)
    def update(self, status): print("step", status.step, flush=True)

recipe = Recipe(rank=4, max_steps=100000, batch_size=1, gradient_accumulation=1, save_steps=100000)
try:
    train(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), recipe, progress=Steps())
except KeyboardInterrupt as interrupt:
    print("interrupted", interrupt, flush=True)
    sys.exit(130)
"""


def test_sigint_to_a_process_saves_and_ends_with_130(base: Path, data: Path, tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(data), str(base), str(tmp_path / "out")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step 5"):
            process.send_signal(signal.SIGINT)
            break
    rest, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (130, "")  # transformers has something to say about the padding token
    assert "PAD" in (tmp_path / "out/train.log").read_text()
    assert "Ctrl-C: stopping after this step" in rest
    (kept,) = RunFolder(tmp_path / "out").checkpoint_steps()
    assert f"interrupted Step {kept} of 100000 is kept" in rest
    assert (tmp_path / f"out/checkpoints/checkpoint-{kept}/optimizer.pt").is_file()
