"""The comparison: which models it is of, what is trained and what is skipped, and the script as its users run it."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from pipelines import Pipeline
from pipelines.checkpoint import build_prior, fingerprint
from pipelines.comparison import progress as progress_module
from pipelines.comparison.checks import check_before
from pipelines.comparison.entries import Entry, check_models, read_entries, resolve
from pipelines.comparison.progress import Progress, duration
from pipelines.comparison.running import IN_WORDS, Runner, _steps_done, members_of
from pipelines.config import differences, read_yaml
from pipelines.files import write_json_atomic
from pipelines.images import DataConfig, load_images
from pipelines.training_config import TrainingConfig
from prior.base import CodeSpec
from tests.outline import Outline
from tests.test_pipeline import make as make_pipeline
from tests.test_pipeline import make_prior

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "scripts" / "configs"
RECIPES = sorted(CONFIGS.glob("comparison_*.yaml"))
VQ = {
    "type": "vqvae",
    "downsample_factor": 4,
    "latent_dim": 4,
    "network": {"type": "conv", "hidden_dim": 4, "num_residual_blocks": 0, "residual_dim": 2},
    "quantizer": {"type": "ema_vq", "codebook_size": 8, "code_dim": 4},
    "likelihood": {"type": "bernoulli"},
}
GPT = {"type": "gpt", "num_layers": 1, "num_heads": 2, "hidden_dim": 16}
NORMALS = {"type": "gaussian_vae", "latent_dim": 2, "network": {"type": "mlp", "hidden_dim": 8, "num_layers": 1}}


# Entries
# --------------------------------------------------------------------------------------------


def write_entries(folder: Path, models, **common) -> Path:
    path = folder / "entries.yaml"
    path.write_text(yaml.safe_dump({**common, "models": models}))
    return path


def resolved(path: Path, **changed) -> list[Entry]:
    entries = read_entries(path)
    sections = {name: entries[name] | changed.get(name, {}) for name in ("data", "stage_one", "stage_two")}
    return resolve(entries["models"], **sections)


@pytest.mark.parametrize(
    ("models", "message"),
    [
        ([], "lists no models"),
        ("vqvae", "lists no models"),
        (["vqvae"], "model 1 must hold fields"),
        ([{"tokenizer": VQ}], "name must consist of letters"),
        ([{"name": "a/b", "tokenizer": VQ}], "because it names a folder, got 'a/b'"),
        ([{"name": "..", "tokenizer": VQ}], "because it names a folder"),
        ([{"name": "a", "tokenizer": VQ, "priors": GPT}], "unknown field 'priors'; did you mean 'prior'"),
        ([{"name": "a", "tokenizer": VQ}, {"name": "A", "tokenizer": VQ}], "two models named 'A'"),
        ([{"name": "a"}], "needs either tokenizer"),
        ([{"name": "a", "tokenizer": VQ, "tokenizer_of": "b"}], "needs either tokenizer"),
        ([{"name": "a", "tokenizer": "vqvae"}], "tokenizer must hold a type and its options"),
        ([{"name": "a", "tokenizer": VQ, "prior": {"hidden_dim": 8}}], "prior must hold a type"),
        (
            [{"name": "a", "tokenizer": VQ, "stage_one": {"total_steps": 3}}],
            "stage_one.total_steps is part of the budget",
        ),
        ([{"name": "a", "tokenizer": VQ, "stage_one": {"steps": 3}}], "unknown field 'steps'"),
        ([{"name": "a", "tokenizer": VQ, "stage_two": {"seed": 3}}], "it has no prior"),
        ([{"name": "a", "tokenizer_of": "b", "prior": GPT}], "must name a model listed above it, got 'b'"),
        ([{"name": "a", "tokenizer": VQ}, {"name": "b", "tokenizer_of": "a"}], "it would be the same model"),
        (
            [
                {"name": "a", "tokenizer": VQ},
                {"name": "b", "tokenizer_of": "a", "prior": GPT},
                {"name": "c", "tokenizer_of": "b", "prior": GPT},
            ],
            "name 'a' itself",
        ),
        (
            [
                {"name": "a", "tokenizer": VQ},
                {"name": "b", "tokenizer_of": "a", "prior": GPT, "stage_one": {"seed": 1}},
            ],
            "stage_one has no effect",
        ),
    ],
)
def test_a_wrong_entry_is_named_with_the_mend(tmp_path, models, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        read_entries(write_entries(tmp_path, models))


def test_a_wrong_field_of_the_file_is_named(tmp_path):
    with pytest.raises(ValueError, match="unknown field 'model'; did you mean 'models'"):
        read_entries(write_entries(tmp_path, [{"name": "a", "tokenizer": VQ}], model=[]))
    with pytest.raises(ValueError, match=r"nowhere\.yaml cannot be read: No such file"):
        read_entries(tmp_path / "nowhere.yaml")


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"tokenizer": {**VQ, "codebook": 3}}, "model 'x': unknown field 'tokenizer.codebook'"),
        (
            {"tokenizer": {**VQ, "quantizer": {"type": "fsq", "codebook_size": 8}}},
            "'tokenizer.quantizer.codebook_size'",
        ),
        ({"tokenizer": {**VQ, "type": "vqvea"}}, "unknown tokenizer 'vqvea'; did you mean 'vqvae'"),
        ({"tokenizer": VQ, "prior": {**GPT, "num_block": 3}}, "model 'x': unknown field 'prior.num_block'"),
        ({"tokenizer": {**VQ, "latent_dim": "many"}}, "tokenizer.latent_dim must be an integer, got many"),
        ({"tokenizer": VQ, "stage_one": {"learning_rate": "fast"}}, "training.learning_rate must be a finite number"),
    ],
)
def test_an_option_that_a_model_does_not_have_is_refused_by_name(tmp_path, model, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        resolved(write_entries(tmp_path, [{"name": "x", **model}]))


def test_what_is_common_and_what_is_a_models_own_come_together(tmp_path):
    models = [
        {"name": "a", "tokenizer": VQ, "prior": GPT, "stage_one": {"learning_rate": 0.25}},
        {"name": "b", "title": "B", "tokenizer_of": "a", "prior": {"type": "pixelcnn"}, "stage_two": {"adam_eps": 0.5}},
    ]
    path = write_entries(tmp_path, models, data={"binarize": "fixed"}, stage_one={"total_steps": 7, "learning_rate": 1})
    first, second = resolved(path, stage_two={"total_steps": 9})
    assert first.stage_one["data"]["binarize"] == "fixed"
    assert first.stage_one["training"] == {
        **vars(TrainingConfig()), "total_steps": 7, "learning_rate": 0.25,
    }  # fmt: skip
    assert first.stage_two["class_conditional"] is False
    assert second.stage_one == first.stage_one
    assert (second.title, second.tokenizer_of) == ("B", "a")
    assert second.stage_two["prior"]["type"] == "pixelcnn"
    assert second.stage_two["training"] == {**vars(TrainingConfig()), "total_steps": 9, "adam_eps": 0.5}


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"tokenizer": {**VQ, "likelihood": {"type": "bernoulli"}}}, "model 'x': likelihood 'bernoulli' is for binary"),
        ({"tokenizer": NORMALS | {"likelihood": {"type": "normal"}}, "prior": GPT}, "stage two takes integer codes"),
        ({"tokenizer": VQ | {"likelihood": {"type": "normal"}}, "prior": {"type": "uniform"}}, "has nothing to train"),
        ({"tokenizer": VQ | {"likelihood": {"type": "normal"}, "latent_dim": 0}}, "model 'x': latent_dim must be at"),
        (
            {"tokenizer": VQ | {"likelihood": {"type": "normal"}}, "stage_one": {"adam_eps": 0}},
            "training.adam_eps must be",
        ),
    ],
)
def test_a_model_that_cannot_be_built_is_refused_before_training(tmp_path, model, message):
    entries = resolved(write_entries(tmp_path, [{"name": "x", **model}]))
    with pytest.raises(ValueError, match=re.escape(message)):
        check_models(entries, load_images(DataConfig(), "train"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_samples": 2}, "num_samples must be at least 10, got 2"),
        ({"num_draws": 0}, "num_draws must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"seed": 2**64}, "seed must lie in"),
        ({"metrics": []}, "metrics must name at least one group of likelihood, "),
        ({"inception_weights": "nosuch.safetensors"}, "there is no file .*nosuch.safetensors"),
        ({"lpips_weights": "alex.pth"}, "safetensors files only, got 'alex.pth'"),
        ({"split": "validation"}, "the validation split of .* is empty"),
        ({}, None),
    ],
)
def test_an_evaluation_that_cannot_be_made_is_refused_before_training(tmp_path, options, message):
    data = {"name": "digits", "binarize": "fixed", "validation_fraction": 0.0}
    entries = resolved(write_entries(tmp_path, [{"name": "a", "tokenizer": VQ}], data=data))
    evaluation = {"split": "test", "metrics": None, "num_draws": 1, "num_samples": 10, "inception_weights": None,
                  "lpips_weights": None, "seed": 0, "batch_size": 8}  # fmt: skip
    runner = Runner(tmp_path / "out", tmp_path, evaluation | options)
    with nullcontext() if message is None else pytest.raises(ValueError, match=message):
        check_before(members_of(entries, [], runner.output), runner, entries[0].stage_one["data"])


def test_a_model_that_cannot_stand_beside_those_that_are_measured_is_refused_before_training(tmp_path):
    data = {"name": "digits", "binarize": "fixed"}
    entries = resolved(write_entries(tmp_path, [{"name": name, "tokenizer": VQ} for name in "ab"], data=data))
    evaluation = {"split": "test", "metrics": None, "num_draws": 1, "num_samples": 10, "inception_weights": None,
                  "lpips_weights": None, "seed": 0, "batch_size": 8}  # fmt: skip
    runner = Runner(tmp_path / "out", tmp_path, evaluation)
    runner.missing = lambda member: [] if member.name == "a" else ["stage_one", "evaluation"]
    members = members_of(entries, [], runner.output)
    identity = load_images(DataConfig(**entries[0].stage_one["data"]), "test").identity
    result = {"data": identity, "protocol": {}, "seed": 0, "groups": {}, "metrics": {}}
    (runner.output / "models" / "a").mkdir(parents=True)
    for content, message in ((identity["content"], None), ("0" * 64, "a and b cannot stand in one table")):
        measured = {**result, "data": {**identity, "content": content}}
        write_json_atomic(runner.output / "models" / "a" / "evaluation.json", measured)
        with nullcontext() if message is None else pytest.raises(ValueError, match=message):
            check_before(members, runner, entries[0].stage_one["data"])


@pytest.mark.parametrize("missing", [[], ["evaluation"]])
def test_a_model_trained_on_other_images_than_there_are_now_is_refused(tmp_path, missing, capsys):
    data = {"name": "digits", "binarize": "fixed"}
    entries = resolved(write_entries(tmp_path, [{"name": "a", "tokenizer": VQ}], data=data))
    evaluation = {"split": "test", "metrics": None, "num_draws": 1, "num_samples": 10, "inception_weights": None,
                  "lpips_weights": None, "seed": 0, "batch_size": 8}  # fmt: skip
    runner = Runner(tmp_path / "out", tmp_path, evaluation)
    runner.missing = lambda member: missing
    members = members_of(entries, [], runner.output)
    test, train = (load_images(DataConfig(**entries[0].stage_one["data"]), split) for split in ("test", "train"))
    state = members[0].folder / "stage_one" / "state" / "step-00000004"
    state.mkdir(parents=True)
    for content, message in ((test.identity["content"], None), ("0" * 64, "what the entries name now cannot stand")):
        result = {"data": {**test.identity, "content": content}, "protocol": {}, "seed": 0, "groups": {}, "metrics": {}}
        write_json_atomic(members[0].folder / "evaluation.json", result)
        for contents, refused in ((train.contents, None), ("0" * 64, "a was trained on other images than those")):
            write_json_atomic(state / "state.json", {"surroundings": {"training data": contents}})
            expected = refused if missing else message or refused
            with nullcontext() if expected is None else pytest.raises(ValueError, match=expected):
                check_before(members, runner, entries[0].stage_one["data"])
    if not missing:  # then the table stands as it was measured
        check_before(members, runner, entries[0].stage_one["data"] | {"name": "folder", "root": str(tmp_path / "gone")})
        assert "is not known: " in capsys.readouterr().err


def test_the_run_folders_of_the_example_are_of_the_same_data():
    (example,) = re.findall(
        r"--runs '\[(.*?)\]'", (ROOT / "scripts" / "compare.py").read_text().partition('"""\n\n')[0]
    )
    recipes = [read_yaml(CONFIGS / f"{name}.yaml") for name in ("dvaepp_mnist", "mnist_gaussian_vae")]
    assert example.split(", ") == [f"runs/mnist-{recipe['tokenizer']['type']}" for recipe in recipes]
    assert recipes[0]["data"] == recipes[1]["data"]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_recipes_compare_at_one_budget_and_likelihood(path):
    entries = resolved(path)
    for stage in ("stage_one", "stage_two"):
        trainings = [getattr(entry, stage)["training"] for entry in entries if getattr(entry, stage)]
        assert len({(training["total_steps"], training["batch_size"]) for training in trainings}) == 1
    assert len({json.dumps(entry.stage_one["tokenizer"]["likelihood"]) for entry in entries}) == 1
    assert f"--entries scripts/configs/{path.name}" in path.read_text()


@pytest.mark.parametrize("data", ["mnist", "cifar10"])
def test_the_recipes_of_tokenizers_compare_those_that_they_promise(data):
    entries = resolved(CONFIGS / f"comparison_{data}.yaml")
    tokenizers = {entry.stage_one["tokenizer"]["type"] for entry in entries}
    quantizers = {entry.stage_one["tokenizer"].get("quantizer", {}).get("type") for entry in entries}
    assert {"vqvae", "vqvae2", "dvaepp", "gaussian_vae"} <= tokenizers
    assert {"ema_vq", "fsq", "lfq", "residual", "gumbel"} <= quantizers
    if data == "mnist":
        assert {"nvil", "vimco", "concrete", "dvaesharp"} <= tokenizers


@pytest.mark.parametrize("data", ["mnist", "cifar10"])
def test_the_recipes_of_priors_compare_equal_sizes_over_the_same_codes(data):
    levels = {"vqvae": CodeSpec(((8, 8),), (512,)), "vqvae2": CodeSpec(((4, 4), (8, 8)), (512, 512))}
    sizes = {tokenizer: {} for tokenizer in levels}
    for entry in resolved(CONFIGS / f"comparison_priors_{data}.yaml"):
        tokenizer, options = entry.stage_one["tokenizer"]["type"], entry.stage_two["prior"]
        prior = build_prior({**options, "spec": levels[tokenizer]})
        sizes[tokenizer][options["type"]] = sum(parameter.numel() for parameter in prior.parameters())
    for of_priors in sizes.values():
        assert of_priors.keys() == {"pixelcnn", "pixelsnail", "gpt"}
        assert max(of_priors.values()) < 1.1 * min(of_priors.values())


# What is run
# --------------------------------------------------------------------------------------------

# In place of the training scripts: each notes that it was called, and leaves what theirs would
STAND_IN = """
import json, sys, yaml
from pathlib import Path

WEIGHTS = "tokenizer/model.safetensors"
script, arguments = Path(sys.argv[0]).stem, sys.argv[1:]
options = {name.removeprefix("--"): value for name, value in zip(arguments[::2], arguments[1::2])}
run = Path(options["run" if script == "evaluate" else "output"])
with open(CALLS, "a") as calls:
    calls.write(json.dumps([script, run.name, options]) + "\\n")
print("working")
if (script, run.name) in FAILS:
    sys.exit("error: it does not like " + run.name)
if script == "evaluate":
    (run / "evaluation.json").write_text(json.dumps(options))
else:
    config = yaml.safe_load(Path(options["config"]).read_text())
    stage, model = ("stage_one", "tokenizer") if script == "train_tokenizer" else ("stage_two", "prior")
    for name in (stage, model):
        (run / name).mkdir(parents=True, exist_ok=True)
    (run / stage / "config.yaml").write_text(yaml.safe_dump({**config, "output": str(run)}))
    (run / model / "model.safetensors").write_text(json.dumps(config) + SALT)
    if script == "train_prior" and options["run"] != options["output"]:
        (run / "tokenizer").mkdir(exist_ok=True)
        (run / WEIGHTS).write_bytes((Path(options["run"]) / WEIGHTS).read_bytes())
"""


class Workplace:
    """A comparison of three models, two of which share a tokenizer, with scripts that only pretend to train."""

    MODELS = (
        {"name": "vq", "tokenizer": VQ, "prior": GPT},
        {"name": "snail", "tokenizer_of": "vq", "prior": {"type": "pixelsnail"}},
        {"name": "normals", "tokenizer": NORMALS},
    )

    def __init__(self, folder: Path):
        self.folder, self.output, self.calls = folder, folder / "out", folder / "calls"
        self.models = [dict(model) for model in self.MODELS]
        self.evaluation: dict = {"num_draws": 1}
        self.root = "data"
        self.write_scripts()

    def write_scripts(self, fails=(), extra: str = "", salt: str = "") -> None:
        (self.folder / "scripts").mkdir(exist_ok=True)
        text = f"CALLS, FAILS, SALT = {str(self.calls)!r}, {set(fails)!r}, {salt!r}\n{extra}{STAND_IN}"
        for name in ("train_tokenizer", "train_prior", "evaluate"):
            (self.folder / "scripts" / f"{name}.py").write_text(text)

    def run(self, progress: Progress | None = None):
        entries = resolved(write_entries(self.folder, self.models), data={"root": self.root})
        runner = Runner(self.output, self.folder / "scripts", self.evaluation, {"data.root": self.root})
        progress = progress or Progress(steps={}, in_words=IN_WORDS)
        self.calls.write_text("")
        failures = runner.run(members_of(entries, [], self.output), progress)
        called = [json.loads(line) for line in self.calls.read_text().splitlines()]
        return [f"{script} {name}" for script, name, _ in called], failures

    def options_of(self, script: str, name: str) -> dict:
        called = [json.loads(line) for line in self.calls.read_text().splitlines()]
        return next(options for s, n, options in called if (s, n) == (script, name))


ALL = ["train_tokenizer vq", "train_prior vq", "evaluate vq", "train_prior snail", "evaluate snail",
       "train_tokenizer normals", "evaluate normals"]  # fmt: skip


@pytest.fixture
def workplace(tmp_path):
    return Workplace(tmp_path)


def test_each_stage_is_run_once_and_skipped_when_it_is_finished(workplace):
    assert workplace.run() == (ALL, {})
    assert workplace.run() == ([], {})


def test_a_shared_tokenizer_is_the_run_that_its_second_prior_starts_from(workplace):
    workplace.run()
    options = workplace.options_of("train_prior", "snail")
    assert options["run"] == str(workplace.output / "models" / "vq")
    assert options["output"] == str(workplace.output / "models" / "snail")
    assert workplace.options_of("train_prior", "vq")["run"] == str(workplace.output / "models" / "vq")


def test_the_scripts_get_the_whole_recipe_and_the_evaluation_its_options(workplace):
    workplace.evaluation = {"num_draws": 5, "metrics": ["likelihood", "samples"], "lpips_weights": None, "json": True}
    workplace.run()
    recipe = read_yaml(workplace.options_of("train_tokenizer", "vq")["config"])
    assert recipe["tokenizer"]["quantizer"]["codebook_size"] == 8
    assert recipe["training"].keys() == vars(TrainingConfig()).keys()
    options = workplace.options_of("evaluate", "vq")
    del options["run"]
    assert options == {
        "num_draws": "5", "metrics": "[likelihood, samples]", "json": "true", "data.root": "data", "keep": "false",
    }  # fmt: skip


def test_another_evaluation_only_evaluates_again(workplace):
    workplace.run()
    workplace.evaluation = {"num_draws": 2}
    assert workplace.run()[0] == ["evaluate vq", "evaluate snail", "evaluate normals"]
    workplace.evaluation = {"num_draws": 2, "device": "cpu", "cache": "elsewhere"}
    assert workplace.run()[0] == []


def test_where_the_data_lie_changes_nothing(workplace):
    workplace.run()
    workplace.root = "elsewhere"
    assert workplace.run()[0] == []


def test_a_changed_entry_is_refused_before_anything_is_trained(workplace):
    workplace.run()
    workplace.models[0]["tokenizer"] = {**VQ, "latent_dim": 5}
    workplace.models.insert(0, {"name": "new", "tokenizer": VQ})
    with pytest.raises(ValueError, match=r"'vq', stage one \(tokenizer.latent_dim: 4 -> 5\)") as error:
        workplace.run()
    assert "'snail', stage one" not in str(error.value)  # a copy, which has no configuration here
    assert "remove the folders of these models" in str(error.value)
    assert workplace.calls.read_text() == ""


def test_another_budget_is_refused_because_the_schedule_has_ended(workplace):
    workplace.run()
    workplace.models[2]["stage_one"] = {"weight_decay": 0.5}
    with pytest.raises(ValueError, match=r"training[.]weight_decay: 0.0 -> 0.5"):
        workplace.run()
    del workplace.models[2]["stage_one"]
    path = workplace.output / "models" / "normals" / "stage_one" / "config.yaml"
    path.write_text(path.read_text().replace("total_steps: 2000", "total_steps: 1000"))
    with pytest.raises(ValueError, match=r"training[.]total_steps: 1000 -> 2000"):
        workplace.run()


def test_a_second_stage_that_its_entry_does_not_have_any_more_is_refused(workplace):
    workplace.run()
    del workplace.models[0]["prior"]
    with pytest.raises(ValueError, match=r"'vq' has a second stage in .* but none in its entry"):
        workplace.run()


def test_what_was_interrupted_is_continued_where_it_stopped(workplace):
    workplace.run()
    record = workplace.output / "records" / "vq.json"
    stages = json.loads(record.read_text())
    del stages["stage_two"], stages["evaluation"]
    record.write_text(json.dumps(stages))
    assert workplace.run()[0] == ["train_prior vq", "evaluate vq"]


def test_weights_that_were_replaced_by_hand_are_seen(workplace):
    workplace.run()
    (workplace.output / "models" / "normals" / "tokenizer" / "model.safetensors").write_text("others")
    assert workplace.run()[0] == ["train_tokenizer normals", "evaluate normals"]
    (workplace.output / "models" / "vq" / "evaluation.json").unlink()
    assert workplace.run()[0] == ["evaluate vq"]


def test_a_tokenizer_that_is_trained_anew_takes_along_all_that_was_made_of_it(workplace):
    workplace.run()
    (workplace.output / "models" / "vq" / "tokenizer" / "model.safetensors").unlink()
    workplace.write_scripts(salt="other weights")
    assert workplace.run()[0] == ALL[:5]


def test_a_failure_is_reported_with_its_log_and_the_others_go_on(workplace):
    workplace.write_scripts(fails={("train_prior", "vq")})
    called, failures = workplace.run()
    assert called == [one for one in ALL if one != "evaluate vq"]
    (failure,) = failures.values()
    assert (failure.title, failure.stage, failure.reason) == ("vq", "stage_two", "it does not like vq")
    assert "working" in failure.log.read_text()
    workplace.write_scripts()
    assert workplace.run() == (["train_prior vq", "evaluate vq"], {})


BAR = "stage_one:  12%|#   | 30/250 [00:10<01:10, 3.1step/s, loss=0.2]"


@pytest.mark.parametrize("said", ["", BAR, "error: it could not warm up"])
def test_a_stage_that_is_killed_is_said_to_be(workplace, said):
    workplace.write_scripts(fails={("train_tokenizer", "vq")})
    workplace.run()  # whose error is in the log
    workplace.write_scripts(extra=f"import os\nprint({said!r}, flush=True)\nos.kill(os.getpid(), 9)\n")
    assert workplace.run()[1]["vq"].reason == "it was killed by signal 9 (out of memory?)"


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("sys.exit('error: no such thing')", "no such thing"),
        ("print('x.py: error: unknown field'); sys.exit(2)", "unknown field"),
        ("raise RuntimeError('CUDA error: an assert\\nCompile with more')", "RuntimeError: CUDA error: an assert"),
        (f"print({BAR!r}); sys.exit(3)", "it ended with status 3"),
        ("os.abort()", "it was killed by signal 6"),
    ],
)
def test_the_reason_of_a_failure_is_its_error_and_no_other_line(workplace, script, reason):
    workplace.models = workplace.models[2:]
    workplace.write_scripts(fails={("train_tokenizer", "normals")})
    workplace.run()
    workplace.write_scripts(extra=f"import os, sys\n{script}\n")
    assert workplace.run()[1]["normals"].reason == reason


def test_models_that_share_a_failed_tokenizer_are_not_tried(workplace):
    workplace.write_scripts(fails={("train_tokenizer", "vq")})
    called, failures = workplace.run()
    assert called == ["train_tokenizer vq", "train_tokenizer normals", "evaluate normals"]
    assert failures["snail"].reason == "it shares the tokenizer of 'vq', which failed"


def test_a_script_that_leaves_nothing_has_failed(workplace):
    workplace.write_scripts(extra="raise SystemExit(0)\n")
    _, failures = workplace.run()
    assert failures.keys() == {"vq", "snail", "normals"}
    assert "left no" in failures["vq"].reason


def test_a_signal_to_stop_reaches_the_training_and_waits_for_its_state(workplace):
    saved = workplace.folder / "saved"
    extra = (
        "import pathlib, signal, sys, time\n"
        f"def stop(*_):\n    time.sleep(.2)\n    pathlib.Path({str(saved)!r}).write_text('state')\n    sys.exit(143)\n"
        f"signal.signal(signal.SIGTERM, stop)\npathlib.Path({str(saved)!r}).write_text('')\ntime.sleep(60)\n"
    )
    workplace.write_scripts(extra=extra)

    def send_when_it_runs():
        while not saved.exists():
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=send_when_it_runs, daemon=True).start()
    with pytest.raises(SystemExit) as stopped:
        workplace.run()
    assert stopped.value.code == 143
    assert saved.read_text() == "state"


def test_a_run_folder_keeps_its_evaluation_unless_the_model_is_newer(workplace):
    workplace.run()
    run = workplace.output / "models" / "normals"
    (run / "model_index.json").write_text("{}")
    runner = Runner(workplace.folder / "other", workplace.folder / "scripts", {"num_draws": 100})
    (member,) = members_of([], [str(run)], runner.output)
    assert runner.missing(member) == []
    later = time.time() + 10
    os.utime(run / "tokenizer" / "model.safetensors", (later, later))
    assert runner.missing(member) == ["evaluation"]


@pytest.mark.parametrize("prior", [None, "pixelcnn"])
@pytest.mark.parametrize("seconds", [-10, 10])  # of a copy's files the times tell nothing
def test_an_evaluation_that_names_its_weights_counts_for_these_alone(prior, seconds, tmp_path):
    def still_missing(pipeline) -> list[str]:
        pipeline.save_pretrained(tmp_path / "run")
        os.utime(result, (time.time() + seconds,) * 2)
        return runner.missing(*members_of([], [str(tmp_path / "run")], runner.output))

    runner, result = Runner(tmp_path / "out", tmp_path, {}), tmp_path / "run" / "evaluation.json"
    pipeline = make_pipeline(prior=prior)
    measured = {"tokenizer": pipeline.tokenizer} | ({"prior": pipeline.prior} if prior else {})
    pipeline.save_pretrained(tmp_path / "run")
    write_json_atomic(result, {"weights": {name: fingerprint(model) for name, model in measured.items()}})
    assert still_missing(pipeline) == []
    assert still_missing(Pipeline(pipeline.tokenizer, make_prior("gpt", pipeline.tokenizer))) == ["evaluation"]
    assert still_missing(make_pipeline(prior=prior)) == ["evaluation"]


def test_folders_that_cannot_be_compared_are_refused(tmp_path):
    for name in ("a/x", "b/x"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "model_index.json").write_text("{}")
    with pytest.raises(ValueError, match="two of the models to compare are named 'x'"):
        members_of([], [str(tmp_path / "a/x"), str(tmp_path / "b/x")], tmp_path)
    with pytest.raises(ValueError, match=r"has no model_index[.]json"):
        members_of([], [str(tmp_path / "a")], tmp_path)


# Progress
# --------------------------------------------------------------------------------------------


def test_the_time_left_follows_from_the_stages_that_are_known(monkeypatch):
    now = 1000.0
    monkeypatch.setattr(progress_module, "time", SimpleNamespace(monotonic=lambda: now))
    progress = Progress(steps={"stage_one": 100}, in_words=IN_WORDS, seconds={"stage_one": [30.0]})
    progress.start([("a", ["stage_one", "evaluation"]), ("b", ["evaluation"]), ("c", [])])
    assert progress.seconds_left() == pytest.approx(90)  # nothing is known of evaluations but that stages take 30 s
    progress.begin(0, "a", "stage_one")
    assert progress.headline() == "[1/3] a: stage one"
    now += 10
    progress.at(25)  # a quarter in 10 s: 30 s to go, and 40 s in all
    assert progress.seconds_left() == pytest.approx(30 + 2 * 35)
    progress.end(True)
    progress.drop(0)
    assert [title for _, title, _ in progress.plan] == ["b"]
    progress.close()


def test_the_time_left_of_a_stage_that_goes_on_is_that_of_its_steps_from_there(monkeypatch):
    now = 1000.0
    monkeypatch.setattr(progress_module, "time", SimpleNamespace(monotonic=lambda: now))
    progress = Progress(steps={"stage_one": 100}, in_words=IN_WORDS, seconds={"stage_one": [400.0]})
    progress.start([("a", ["stage_one"]), ("b", ["stage_one"])])
    progress.begin(0, "a", "stage_one", step=80)
    assert progress.seconds_left() == pytest.approx(0.2 * 400 + 400)
    now += 10
    progress.at(80)
    assert progress.seconds_left() == pytest.approx(0.2 * 400 - 10 + 400)
    now += 10
    progress.at(90)  # 10 steps in 20 s: 20 s to go, and 200 s in all
    assert progress.seconds_left() == pytest.approx(20 + 400)
    now += 20
    progress.at(100)
    assert progress.stage_seconds() == pytest.approx(200)
    progress.end(True)
    assert progress.seconds["stage_one"] == [400, pytest.approx(200)]
    progress.begin(1, "b", "stage_one", step=50)
    now += 5
    progress.at(30)  # its last state was earlier than its log
    assert progress.seconds_left() == pytest.approx(0.7 * 300 - 5)
    progress.end(True)
    assert len(progress.seconds["stage_one"]) == 2  # of which part it took these seconds is not known
    progress.close()


def test_without_any_experience_no_time_is_promised():
    progress = Progress(steps={}, in_words=IN_WORDS)
    progress.start([("a", ["stage_one"])])
    progress.begin(0, "a", "stage_one")
    assert progress.seconds_left() is None
    assert "left" not in progress.times()
    progress.close()


def test_a_line_of_a_log_that_is_half_written_tells_no_step(tmp_path):
    log = tmp_path / "log.jsonl"
    log.write_text('{"step": 100, "train/nll": 1.0}\n{"step": 12')
    assert _steps_done(log) == 100


def test_durations_are_read_by_people():
    assert [duration(s) for s in (0.4, 59.4, 59.6, 200, 7500)] == [
        "0 s",
        "59 s",
        "1 min 0 s",
        "3 min 20 s",
        "2 h 5 min",
    ]


# As its users run it
# --------------------------------------------------------------------------------------------


def compare(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(ROOT / "scripts" / "compare.py"), *arguments]
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600, check=False
    )


@pytest.mark.timeout(900)  # eight processes, each of which imports torch
def test_two_models_are_trained_measured_and_shown(tmp_path):
    training = {"total_steps": 3, "batch_size": 16, "eval_every": 3, "save_every": 3, "warmup_steps": 1,
                "tracker": "none", "cpu": True}  # fmt: skip
    models = [{"name": "vq", "tokenizer": VQ, "prior": GPT}, {"name": "normals", "tokenizer": NORMALS}]
    data = {"name": "digits", "binarize": "fixed"}
    path = write_entries(tmp_path, models, data=data, stage_one=training, stage_two=training)
    options = ["--entries", str(path), "--output", "out", "--num_draws", "2", "--metrics", "[likelihood, codebook]"]
    done = compare(tmp_path, *options)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "[2/2] normals: evaluation" in done.stderr
    assert "the page is out/comparison.html" in done.stdout
    text = (tmp_path / "out" / "comparison.html").read_text()
    assert len(Outline(text).all("img")) == 4
    assert {"vq", "normals"} <= {text for _, text in Outline(text).all("th")}

    # Again: nothing is left to do, and what is printed is JSON
    done = compare(tmp_path, *options, "--json", "true")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "2 of them ready, 0 stages to run" in done.stderr
    rows = {model["name"]: model["metrics"] for model in json.loads(done.stdout)["models"]}
    measured = json.loads((tmp_path / "out" / "models" / "vq" / "evaluation.json").read_text())["metrics"]
    assert differences({name: rows["vq"][name] for name in measured}, measured) == {}
    assert rows["vq"]["stage_two_steps"] == rows["normals"]["stage_one_steps"] == 3
    assert rows["vq"]["uniform_nats_per_code"] == pytest.approx(math.log(8))
    assert 0 < rows["vq"]["unigram_nats_per_code"] < math.log(8)
    assert rows["normals"]["tokenizer_parameters"] > 0
    assert rows["normals"]["num_draws"] == 2

    # A run that was evaluated otherwise is refused before anything is trained
    (tmp_path / "out" / "models" / "normals").rename(tmp_path / "mine")
    done = compare(tmp_path, "--entries", str(path), "--output", "new", "--runs", "mine", "--num_draws", "3")
    assert re.fullmatch(r"error: 'likelihood' of mine cannot stand in .*num_draws: 2 and 3.*\n", done.stderr)
    assert not (tmp_path / "new").exists()
    (tmp_path / "mine").rename(tmp_path / "out" / "models" / "normals")

    # Its folders are runs like others; two protocols end in one line
    runs = [str(tmp_path / "out" / "models" / name) for name in ("vq", "normals")]
    result = json.loads((Path(runs[0]) / "evaluation.json").read_text())
    result["protocol"]["likelihood"]["num_draws"] = 7
    (Path(runs[0]) / "evaluation.json").write_text(json.dumps(result))
    done = compare(tmp_path, "--runs", f"[{', '.join(runs)}]", "--output", "other")
    assert done.returncode == 1
    assert re.fullmatch(r"error: .* cannot stand in one table.*num_draws: 7 and 2.*\n", done.stderr)


def test_a_wrong_command_is_one_line(tmp_path):
    done = compare(tmp_path)
    assert (done.returncode, done.stderr) == (
        1, "error: nothing to compare; give --entries FILE, --runs '[FOLDER, FOLDER]' or both\n",
    )  # fmt: skip
    path = write_entries(tmp_path, [{"name": "a", "tokenizer": VQ}], data={"binarize": "fixed"})
    done = compare(tmp_path, "--entries", str(path), "--metrics", "likelihood", "--num_samples", "2")
    assert (done.returncode, done.stderr) == (1, "error: num_samples must be at least 10, got 2\n")
    assert not (tmp_path / "runs").exists()
    path = write_entries(tmp_path, [{"name": "a", "tokenizer": {**VQ, "latent_dims": 3}}])
    done = compare(tmp_path, "--entries", str(path))
    assert done.returncode == 1
    assert done.stderr.startswith("error: model 'a': unknown field 'tokenizer.latent_dims'; did you mean")
    assert done.stderr.count("\n") == 1
