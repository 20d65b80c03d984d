"""Configuration: dataclasses, YAML and the command line say the same, and what is not known is answered helpfully."""

import os
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from pipelines.checkpoint import build_prior, build_tokenizer
from pipelines.config import Polymorphic, differences, parse, peek, plain, wants_json
from pipelines.images import DataConfig
from pipelines.runs import find_run, load_images_for, save_config, saved_data_section
from pipelines.scripting import Outcome, check_writable, one_line, run_script
from pipelines.training_config import TrainingConfig
from pipelines.two_stage import Pipeline
from prior import PRIORS
from tests import tiny
from tokenizer import TOKENIZERS

RECIPES = Path(__file__).parent.parent / "scripts" / "configs"
CONFIGS = sorted(set(RECIPES.glob("*.yaml")) - set(RECIPES.glob("comparison_*")))  # those are no configurations


@dataclass
class Options:
    """The run.

    Args:
        output: where the run goes.
    """

    output: str | None = None


SECTIONS = {
    "data": DataConfig,
    "tokenizer": Polymorphic(TOKENIZERS, "vqvae"),
    "prior": Polymorphic(PRIORS, "gpt"),
    "training": TrainingConfig,
}


def read(*argv: str) -> dict:
    return parse("A script.", SECTIONS, Options, list(argv))


def yaml_file(folder, text: str) -> str:
    (folder / "a.yaml").write_text(text)
    return str(folder / "a.yaml")


def refusal(capsys, *argv: str) -> str:
    """The message that `argv` is refused with: one line, exit status 2."""
    with pytest.raises(SystemExit) as exit_:
        read(*argv)
    message = capsys.readouterr().err
    assert exit_.value.code == 2
    assert message.count("\n") == 1
    return message


def test_defaults_are_those_of_the_dataclasses():
    config = read()
    assert config["data"] == plain({field.name: field.default for field in fields(DataConfig)})
    assert TrainingConfig(**config["training"]) == TrainingConfig()
    assert config["tokenizer"]["quantizer"]["codebook_size"] == 512
    assert config["output"] is None


@pytest.mark.parametrize("name", sorted(TOKENIZERS))
def test_parsed_defaults_build_the_model_that_its_own_defaults_build(name):
    implied = {"image_shape": (3, 32, 32)}
    if "num_classes" in {field.name for field in fields(TOKENIZERS[name].Config)}:
        implied["num_classes"] = 3
    config = build_tokenizer({**read(f"--tokenizer.type={name}")["tokenizer"], **implied}).config
    default = TOKENIZERS[name].Config(**implied)
    for part in TOKENIZERS[name].parts:
        assert getattr(config, part).items() >= getattr(default, part).items()
    assert {f.name: getattr(config, f.name) for f in fields(config) if f.name not in TOKENIZERS[name].parts} == {
        f.name: getattr(default, f.name) for f in fields(default) if f.name not in TOKENIZERS[name].parts
    }


@pytest.mark.parametrize("name", sorted(PRIORS))
def test_parsed_prior_defaults_are_its_own(name):
    implied = {"spec": tiny.REAL_SPECS["vector"] if name in tiny.REAL_PRIORS else tiny.SPECS["bits"]}
    assert build_prior({**read(f"--prior.type={name}")["prior"], **implied}).config == PRIORS[name].Config(**implied)


def test_the_command_line_overrides_yaml_which_overrides_defaults(tmp_path):
    path = yaml_file(tmp_path, "data: {name: MNIST, channels: 1}\ntokenizer: {latent_dim: 8}\n")
    config = read("--config", path, "--data.name", "CIFAR10")
    assert (config["data"]["name"], config["data"]["channels"]) == ("CIFAR10", 1)
    assert (config["tokenizer"]["latent_dim"], config["tokenizer"]["downsample_factor"]) == (8, 4)


def test_a_section_has_the_fields_of_its_chosen_type(tmp_path, capsys):
    path = yaml_file(tmp_path, "tokenizer: {type: vqvae2, quantizer: {type: vq}}\n")
    from_yaml = read("--config", path)
    from_line = read("--tokenizer.type", "vqvae2", "--tokenizer.quantizer.type=vq")
    from_value = read("--tokenizer", "{type: vqvae2, quantizer: {type: vq}}")
    assert from_yaml == from_line == from_value
    assert "downsample_factors" in from_yaml["tokenizer"]
    assert "downsample_factor" not in from_yaml["tokenizer"]
    assert "decay" not in from_yaml["tokenizer"]["quantizer"]
    assert "unknown field 'prior.kernel_size'" in refusal(capsys, "--prior.kernel_size", "3")
    assert read("--prior.type=pixelcnn", "--prior.kernel_size=3")["prior"]["kernel_size"] == 3


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--data.nmae", "x"], "unknown field 'data.nmae'; did you mean 'data.name'?"),
        (["--learning_rate", "1"], "unknown field 'learning_rate'; did you mean 'training.learning_rate'?"),
        (["--tokenizer.laten", "3"], "unknown field 'tokenizer.laten'; did you mean 'tokenizer.latent_dim'?"),
        (["--tokenizer.type", "vqvea"], "unknown tokenizer 'vqvea'; did you mean 'vqvae'?"),
        (["--tokenizer.quantizer.type=ema"], "unknown quantizer 'ema'"),
        (["--data.binarize", "treshold"], "unknown value 'treshold' for data.binarize; did you mean 'threshold'?"),
        (["--tokenizer.latent_dim", "many"], "tokenizer.latent_dim must be an integer, got many"),
        (["--training.learning_rate", "nan"], "training.learning_rate must be a finite number, got nan"),
        (["--data.image_size", "32"], "data.image_size must be [int, int] or null, got 32"),
        (
            ["--training.compile_mode", "reduce_overhead"],
            "unknown value 'reduce_overhead' for training.compile_mode; did you mean 'reduce-overhead'?",
        ),
        (["--training.mixed_precision", "bf61"], "did you mean 'bf16'? (known: bf16, fp16, no, null)"),
        (["--training.mixed_precision", "none"], "unknown value 'none' for training.mixed_precision; write null for"),
        (["--tokenizer.quantizer.type", "fqs"], "unknown quantizer 'fqs'; did you mean 'fsq'?"),
        (
            ["--tokenizer.quantizer.levels", "[8, 5]"],
            "unknown field 'tokenizer.quantizer.levels': it is a field of quantizer 'fsq'; "
            "add --tokenizer.quantizer.type fsq",
        ),
        (["--prior.kernel_size=3"], "a field of prior 'pixelcnn' or 'pixelsnail'; take one of them as --prior.type"),
        (["--tokenizer.smoothing.type", "power"], "a field of tokenizer 'dvaepp' or 'dvaesharp'; take one of them"),
        (["--tokenizer", "{prior: {num_left: 3}}"], "unknown field 'tokenizer.prior"),
        (["--tokenizer.image_shape", "[3, 8, 8]"], "unknown field 'tokenizer.image_shape'"),
        (["--data", "3"], "--data must hold fields and their values, got '3'"),
        (
            ["--tokenizer.network", "net.yaml"],
            "--tokenizer.network must hold fields and their values, got 'net.yaml'; a file of fields is for --config",
        ),
        (["--tokenizer={network: net.yaml}"], "--tokenizer.network must hold fields and their values, got 'net.yaml'"),
        (["--config"], "argument --config: expected one argument"),
        (["--config", "nowhere.yaml"], "File does not exist"),
        (["odd/p.png"], "'odd/p.png' belongs to no option; a list is written '[a.png, b.png]'"),
        (["--output", "a", "b.png", "--seed", "1"], "'b.png' belongs to no option"),
        (["training.seed=5"], "'training.seed=5' belongs to no option; write --training.seed=5"),
        (
            ["training.sede=5"],
            "'training.sede=5' belongs to no option: they start with --; unknown field 'training.sed",
        ),
        (["training.sede=5"], "did you mean 'training.seed'?"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_wrong_argument_is_refused_on_one_line_with_the_nearest_known(argv, message, capsys):
    assert message in refusal(capsys, *argv)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("data: {nmae: x}", "unknown field 'data.nmae'; did you mean 'data.name'?"),
        ("dat: {name: x}", "unknown field 'dat.name'; did you mean 'data.name'?"),
        ("tokenizer: {quantizer: {codebok_size: 3}}", "did you mean 'tokenizer.quantizer.codebook_size'?"),
        (
            "tokenizer: {quantizer: {levels: [8]}}",
            "field 'tokenizer.quantizer.levels': it is a field of quantizer 'fsq'",
        ),
        (
            "tokenizer: {network: net.yaml}",
            "a.yaml: tokenizer.network must hold fields and their values, got 'net.yaml'",
        ),
        ("data: 3", "data must hold fields and their values, got 3"),
        ("- data", "must hold fields and their values, it holds a list"),
        ("", "must hold fields and their values, it holds nothing"),
        ("data: [1,", "a.yaml is not valid YAML"),
        ("training: {seed: 1}\ntraining: {total_steps: 5}", "'training' is given twice"),
        ("data: {max_images: 1, max_images: 2}", "'max_images' is given twice"),
        ("training:\n  total_steps:", "training.total_steps has no value; give one, or leave the field out"),
        ("training: {mixed_precision: no}", 'YAML reads a bare no as false; write "no" in quotes'),
    ],
)
def test_a_wrong_yaml_file_is_refused_on_one_line(text, message, tmp_path, capsys):
    assert message in refusal(capsys, "--config", yaml_file(tmp_path, text))


@pytest.mark.parametrize("first", [True, False])
def test_a_type_on_the_command_line_leaves_the_fields_of_another_in_yaml_aside(first, tmp_path):
    text = (
        "tokenizer: {type: vqvae, quantizer: {type: ema_vq, codebook_size: 64, code_dim: 8}, latent_dim: 5}\n"
        "training: {batch_size: 7}"
    )
    file, override = ["--config", yaml_file(tmp_path, text)], ["--tokenizer.quantizer.type=vq"]
    config = read(*file, *override) if first else read(*override, *file)
    assert config["tokenizer"]["quantizer"] == read(*override)["tokenizer"]["quantizer"] | {
        "codebook_size": 64, "code_dim": 8,  # which both have
    }  # fmt: skip
    assert (config["tokenizer"]["latent_dim"], config["training"]["batch_size"]) == (5, 7)
    config = read(*file, "--tokenizer.quantizer.type=fsq")
    assert config["tokenizer"]["quantizer"] == read("--tokenizer.quantizer.type=fsq")["tokenizer"]["quantizer"]
    config = read(f"--config={file[1]}", "--tokenizer.type=dvae", "--tokenizer.num_groups=4")
    assert (config["tokenizer"]["type"], config["tokenizer"]["num_groups"]) == ("dvae", 4)
    assert config["training"]["batch_size"] == 7


@dataclass
class TextOptions:
    """Options that may be text.

    Args:
        labels: numbers or names.
        prompts: texts.
        columns: a number.
        box: numbers or a name.
    """

    labels: list[str | int] | str | int | None = None
    prompts: list[str] | str | None = None
    columns: int | None = None
    box: list[int] | str | None = None


@pytest.mark.parametrize(
    ("option", "typed", "expected"),
    [
        ("prompts", "#1 dad", "#1 dad"), ("prompts", "~", "~"), ("prompts", "a #b", "a #b"),
        ("prompts", "[a, b]", ["a", "b"]), ("labels", "#a", "#a"), ("labels", "null", None), ("labels", "001", "001"),
        ("prompts", "[3, 7]", ["3", "7"]), ("prompts", "[010, two]", ["010", "two"]), ("prompts", "[a, b", "[a, b"),
        ("prompts", "[~, a red fox]", ["~", "a red fox"]), ("prompts", "[true, 1e3]", ["true", "1e3"]),
        ("prompts", "[[1], 2]", "[[1], 2]"),
        ("labels", "['001', '010']", ["001", "010"]), ("labels", "[001, 010]", ["001", "010"]),
        ("labels", "[3, 7, a]", [3, 7, "a"]), ("columns", "~", None), ("box", "[010, 8]", [8, 8]),
    ],
)  # fmt: skip
def test_text_arrives_as_it_is_typed_where_yaml_reads_something_else(option, typed, expected):
    for argv in ([f"--{option}", typed], [f"--{option}={typed}"]):
        assert parse("", {}, TextOptions, argv)[option] == expected


@dataclass
class ChoiceOptions:
    """Options that are one of a few names, or something else.

    Args:
        schedule: a name or two numbers.
        groups: a name, or a list of them.
    """

    schedule: Literal["constant", "linear"] | tuple[float, float] = "constant"
    groups: list[Literal["near", "far"]] | Literal["near", "far"] | None = None


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--schedule", "[0.2]"], "'[0.2]' for schedule (known: constant, linear); or give [float, float]"),
        (["--schedule", "linar"], "did you mean 'linear'? (known: constant, linear); or give [float, float]"),
        (["--groups", "[naer]"], "did you mean 'near'? (known: far, near, null); or give [name, ...]"),
    ],
)
def test_what_else_may_stand_in_place_of_a_name_is_said(argv, message, capsys):
    with pytest.raises(SystemExit):
        parse("", {}, ChoiceOptions, argv)
    assert message in capsys.readouterr().err


def test_a_file_may_say_none_of_what_can_be_text(tmp_path):
    path = yaml_file(tmp_path, "prompts: null\nlabels: [001, '002']\n")
    config = parse("", {}, TextOptions, ["--config", path])
    assert (config["prompts"], config["labels"]) == (None, [1, "002"])


def test_help_keeps_the_lines_of_the_description(capsys):
    with pytest.raises(SystemExit):
        parse("A script.\n\n    python first.py\n    python second.py\n", SECTIONS, Options, ["--help"])
    assert "    python first.py\n    python second.py\n" in capsys.readouterr().out


def test_help_shows_the_defaults_that_hold_and_does_without_those_that_cannot_be_had(capsys):
    def missing():
        raise ValueError("no run")

    for defaults, shown in ((lambda: {"training": {"seed": 77}}, "(type: int, default: 77)"), (missing, "--output")):
        with pytest.raises(SystemExit) as exit_:
            parse("A script.", SECTIONS, Options, ["--help"], defaults=defaults)
        assert exit_.value.code == 0
        assert shown in " ".join(capsys.readouterr().out.split())


def test_help_lists_every_field(capsys):
    with pytest.raises(SystemExit) as exit_:
        read("--help")
    text = capsys.readouterr().out
    assert exit_.value.code == 0
    config = read()
    assert "--output" in text
    for section in SECTIONS:
        for field in config[section]:
            assert f"--{section}.{field}" in text
    assert "--tokenizer.quantizer.codebook_size" in text
    assert "--tokenizer.image_shape" not in text  # implied by the data
    assert "Path to a configuration file" not in text  # which a section does not take


def test_a_saved_configuration_reads_back_as_it_was(tmp_path):
    config = read("--tokenizer.type=vqvae2", "--data.image_size=[8, 12]", "--training.learning_rate=1e-05",
                  "--prior.type=pixelcnn", "--output=a ä #b")  # fmt: skip
    save_config(tmp_path / "run" / "config.yaml", config)
    assert read("--config", str(tmp_path / "run" / "config.yaml")) == config


PREPARED = {"image_size": [8, 8], "channels": 3, "resize_filter": "box", "binarize": "fixed", "binarize_seed": 2}


def save_tokenizer(folder) -> Pipeline:
    """A pipeline whose tokenizer was trained on images prepared as `PREPARED` says."""
    options = {**tiny.TOKENIZERS["vqvae"], "preprocessing": {**PREPARED, "crop": "center", "value_range": [0, 1]}}
    pipeline = Pipeline(build_tokenizer({"type": "vqvae", **options}))
    pipeline.save_pretrained(folder)
    return pipeline


def test_a_run_remembers_the_data_of_its_tokenizer_and_how_images_were_prepared(tmp_path):
    save_tokenizer(tmp_path)
    config = read("--data.name=MNIST", "--data.resize_filter=box", "--data.binarize=fixed", "--data.binarize_seed=2",
                  "--data.crop=random")  # fmt: skip
    save_config(tmp_path / "stage_one" / "config.yaml", config)
    again = parse("", SECTIONS, Options, [], defaults=lambda: saved_data_section(tmp_path))
    assert again["data"] == config["data"] | {"image_size": [8, 8], "channels": 3}  # found in the data
    again = parse("", SECTIONS, Options, ["--data.channels=1"], defaults=lambda: saved_data_section(tmp_path))
    assert (again["data"]["channels"], again["data"]["image_size"]) == (1, [8, 8])
    (tmp_path / "stage_one" / "config.yaml").write_text("a: 1")
    with pytest.raises(ValueError, match="has no section 'data'"):
        saved_data_section(tmp_path)


def test_images_of_other_sizes_and_colours_are_prepared_for_the_tokenizer(tmp_path):
    pipeline = save_tokenizer(tmp_path / "run")
    save_config(tmp_path / "run" / "stage_one" / "config.yaml", read("--data.name=digits"))
    (tmp_path / "photos").mkdir()
    for number, mode in enumerate(("L", "RGB", "L", "L")):
        Image.new(mode, (20 + number, 30)).save(tmp_path / "photos" / f"{number}.jpg")
    argv = ["--data.name=folder", f"--data.root={tmp_path / 'photos'}"]
    config = parse("", SECTIONS, Options, argv, defaults=lambda: saved_data_section(tmp_path / "run"))
    images = load_images_for(pipeline.tokenizer, DataConfig(**config["data"]), "all", run=tmp_path / "run")
    assert (len(images), images.image_shape) == (4, (3, 8, 8))


def test_the_folder_of_a_runs_images_is_no_place_for_another_data_set(tmp_path, monkeypatch):
    save_tokenizer(tmp_path)
    save_config(tmp_path / "stage_one" / "config.yaml", read("--data.name=folder", "--data.root=pictures"))
    for arguments, root in (([], "pictures"), (["--data.name=folder"], "pictures"), (["--data.name=MNIST"], None)):
        monkeypatch.setattr("sys.argv", ["extract_codes.py", *arguments])
        assert saved_data_section(tmp_path)["data"].get("root") == root


def test_a_pipeline_without_a_run_says_how_images_are_prepared_where_the_data_are_named(tmp_path, monkeypatch):
    save_tokenizer(tmp_path)
    with pytest.raises(ValueError, match=r"does not say which data .* give --data.name, and --data.root"):
        saved_data_section(tmp_path)
    monkeypatch.setattr("sys.argv", ["evaluate.py", "--data.name", "digits"])
    assert saved_data_section(tmp_path) == {"data": PREPARED}


def test_where_nothing_can_be_written_is_found_before_the_work(tmp_path, monkeypatch):
    check_writable(tmp_path / "new" / "folder" / "a.png")
    assert not (tmp_path / "new").exists()
    (tmp_path / "file").touch()
    check_writable(tmp_path / "file")  # is replaced
    with pytest.raises(ValueError, match=r"x\.png cannot be written: .*file is not a folder that can be written to"):
        check_writable(tmp_path / "file" / "x.png")
    with pytest.raises(ValueError, match="is not a regular file"):
        check_writable(tmp_path)
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # a test that runs as root may write anywhere
    with pytest.raises(ValueError, match=r"new.x\.png cannot be written"):
        check_writable(tmp_path / "new" / "x.png")


def test_a_recipe_by_default_holds_for_the_types_that_it_names():
    recipe = {"prior": {"type": "pixelcnn", "num_layers": 3, "kernel_size": 7}}
    config = parse("", SECTIONS, Options, [], defaults=lambda: recipe)["prior"]
    assert (config["type"], config["num_layers"], config["kernel_size"]) == ("pixelcnn", 3, 7)
    config = parse("", SECTIONS, Options, ["--prior.type=uniform"], defaults=lambda: recipe)["prior"]
    assert config == {"type": "uniform"}


def test_the_newest_run_is_found_unless_one_is_named(tmp_path):
    for age, name in enumerate(["new", "old"]):
        (tmp_path / name / "tokenizer").mkdir(parents=True)
        (tmp_path / name / "tokenizer" / "config.json").touch()
        os.utime(tmp_path / name / "tokenizer" / "config.json", (1000 - age, 1000 - age))
    assert find_run(None, "tokenizer/config.json", tmp_path) == tmp_path / "new"
    assert find_run(str(tmp_path / "old"), "tokenizer/config.json", tmp_path) == tmp_path / "old"
    with pytest.raises(ValueError, match=r"has no model_index\.json"):
        find_run(str(tmp_path / "old"), "model_index.json", tmp_path)
    with pytest.raises(ValueError, match="no run under"):
        find_run(None, "model_index.json", tmp_path)


def test_a_run_that_was_evaluated_again_is_not_the_newest(tmp_path):
    for time, name in ((1, "first"), (2, "second")):
        for path in (tmp_path / name / "tokenizer" / "model.safetensors", tmp_path / name / "model_index.json"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
            os.utime(path, (time, time))
    os.utime(tmp_path / "first" / "model_index.json", (3, 3))
    assert find_run(None, "model_index.json", tmp_path) == tmp_path / "second"


def test_peek_reads_one_value_and_leaves_complaints_to_the_parser():
    assert peek("run", ["--x", "1", "--run", "a"]) == peek("run", ["--run=a"]) == "a"
    assert peek("run", ["--running", "a"]) is peek("run", ["--run"]) is None
    assert peek("data.name", ["--data", "{name: scenes}"]) == peek("data.name", ["--data.name=scenes"]) == "scenes"
    assert peek("data.name", ["--data", "{root: a}"]) is peek("data.name", ["--data", "name"]) is None


SMALL = st.recursive(
    st.integers(0, 2), lambda inner: st.dictionaries(st.sampled_from("ab"), inner, max_size=2), max_leaves=4
)
NESTED = st.dictionaries(st.sampled_from("ab"), SMALL, max_size=2)


@given(NESTED, NESTED)
def test_there_are_no_differences_exactly_where_two_configurations_are_equal(old, new):
    assert (differences(old, new) == {}) == (old == new)


def test_differences_name_the_field_and_both_values():
    old, new = {"a": {"b": 1, "c": 2}}, {"a": {"b": 3, "c": 2}, "d": 4}
    assert differences(old, new) == {"a.b": (1, 3), "d": ("(absent)", 4)}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_recipe_is_read_as_it_stands(path):
    changed = differences(yaml.safe_load(path.read_text()), read("--config", str(path)))
    assert {old for old, _ in changed.values()} <= {"(absent)"}


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        ([], False), (["--json"], True), (["--json", "true"], True), (["--json=false"], False),
        (["--json", "false"], False), (["--json", "--output", "false"], True), (["--output", "json"], False),
    ],
)  # fmt: skip
def test_json_is_an_option_of_every_script_and_no_part_of_its_configuration(arguments, wanted):
    assert wants_json(arguments) == wanted
    assert "json" not in read(*[argument for argument in arguments if argument not in ("--output", "json")])


def test_an_outcome_is_a_table_of_what_it_holds():
    outcome = Outcome(
        {"output": "runs/a", "images": 12345, "validation": {"nll": 1.23456789, "psnr": None}, "l": [1, "b"]}
    )
    assert (
        str(outcome) == "output          runs/a\nimages          12,345\nvalidation.nll  1.2346\nl               1, b"
    )
    assert str(Outcome({}, text="said")) == "said"


def test_json_alone_goes_to_standard_output_and_an_outcomes_error_to_the_exit_status(monkeypatch, capsys):
    def main():
        print("on the way")
        return Outcome({"a": [1]}, text="a table", error="one failed")

    for arguments, said in (["--json"], '{"a": [1]}\n'), ([], "on the way\na table\n"):
        monkeypatch.setattr("sys.argv", ["script", *arguments])
        with pytest.raises(SystemExit) as exit_status:
            run_script(main)
        assert exit_status.value.code == "error: one failed"
        assert capsys.readouterr().out == said


class Broken(torch.utils.data.Dataset):
    def __getitem__(self, index):
        raise ValueError("the picture\n  is broken")


def test_the_error_of_a_worker_is_said_without_its_traceback():
    with pytest.raises(ValueError, match="Original Traceback") as raised:
        next(iter(torch.utils.data.DataLoader(Broken(), sampler=[0], num_workers=1)))
    assert one_line(raised.value) == one_line(ValueError("the\npicture is broken")) == "the picture is broken"
