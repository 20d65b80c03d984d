"""The scripts as their users run them: real processes, through accelerate's launcher, on one and on two of them."""

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import evaluate as evaluate_script
import pytest
import torch
import train_prior as train_prior_script
import yaml
from PIL import Image
from safetensors.torch import load_file

from pipelines import Pipeline, evaluate
from pipelines.checkpoint import build_prior, build_tokenizer, fingerprint, load_tokenizer, save_model
from pipelines.config import Polymorphic, parse, plain
from pipelines.drawing import one_generator_each
from pipelines.files import write_json_atomic
from pipelines.images import DataConfig, load_images
from pipelines.masks import named_mask
from pipelines.pictures import save_grid
from pipelines.runs import save_config, was_trained_on
from pipelines.scripting import choose_device, say_skipped
from pipelines.training import fit
from pipelines.training_config import TrainingConfig
from prior import PRIORS
from prior.base import CodeSpec
from tests import tiny
from tests.test_pipeline import make as make_pipeline
from tokenizer import TOKENIZERS

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = sorted(set((ROOT / "scripts/configs").glob("*.yaml")) - set((ROOT / "scripts/configs").glob("comparison_*")))
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
LAUNCH = [
    "-m",
    "accelerate.commands.launch",
    "--num_machines",
    "1",
    "--mixed_precision",
    "no",
    "--dynamo_backend",
    "no",
]
SHORT = [
    "--training.total_steps",
    "4",
    "--training.eval_every",
    "2",
    "--training.save_every",
    "2",
    "--training.cpu",
    "true",
]
TINY_TOKENIZER = [
    *("--tokenizer.network.hidden_dim", "8", "--tokenizer.network.residual_dim", "4"),
    *("--tokenizer.latent_dim", "8", "--tokenizer.quantizer.code_dim", "4", "--data.max_images", "100"),
]
TINY_PRIOR = ["--prior.num_layers", "1", "--prior.hidden_dim", "16", "--prior.num_heads", "2"]


def run(folder: Path, script: str, *arguments: str, launcher=(), **environment) -> subprocess.CompletedProcess:
    command = [sys.executable, *launcher, str(ROOT / "scripts" / f"{script}.py"), *arguments]
    return subprocess.run(
        command,
        cwd=folder,
        env={**ENVIRONMENT, **environment},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )


def launch(folder: Path, script: str, *arguments: str, num_processes: int = 1) -> subprocess.CompletedProcess:
    """`accelerate launch`; --multi_gpu with ACCELERATE_USE_CPU is what starts several processes on CPUs."""
    several = ["--multi_gpu"] if num_processes > 1 else []
    launcher = [*LAUNCH, *several, "--num_processes", str(num_processes)]
    done = run(folder, script, *arguments, launcher=launcher, ACCELERATE_USE_CPU="true")
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def train_both(folder: Path, num_processes: int) -> Path:
    """What the two training commands leave when told nothing of each other."""
    launch(folder, "train_tokenizer", *TINY_TOKENIZER, *SHORT, num_processes=num_processes)
    launch(folder, "train_prior", *TINY_PRIOR, *SHORT, num_processes=num_processes)
    return folder / "runs" / "digits-vqvae"


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    return train_both(tmp_path_factory.mktemp("work space ä"), num_processes=1)


def check_pipeline_folder(folder: Path) -> None:
    images = Pipeline.from_pretrained(folder).sample(class_labels=["3", 7])
    assert [image.size for image in images] == [(8, 8), (8, 8)]
    for name in ("samples.png", "reconstructions.png"):
        with Image.open(folder / name) as image:
            assert len(image.convert("L").getcolors()) > 2
    assert len(list((folder / "stage_one" / "state").glob("step-*"))) == 2
    assert "validation prior nll" in (folder / "README.md").read_text()


def test_the_two_commands_leave_a_pipeline(run_folder):
    check_pipeline_folder(run_folder)


def test_the_two_commands_leave_a_pipeline_on_two_processes(tmp_path):
    folder = train_both(tmp_path, num_processes=2)
    check_pipeline_folder(folder)
    state = json.loads((folder / "stage_two/state/step-00000004/state.json").read_text())
    assert state["num_processes"] == 2


def test_the_other_scripts_work_on_the_newest_run(run_folder):
    folder = run_folder.parents[1]
    done = run(folder, "evaluate", "--split", "test", "--num_samples", "20", "--ood", "[noise]", "--json")
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout)  # nothing else is on standard output
    metrics = result["metrics"]
    assert metrics["bits_per_dim"] == pytest.approx(metrics["nats"] / (64 * 0.6931472))
    assert {"fid_classifier", "rfid_classifier", "copying", "ood_auroc_noise", "position_entropy"} <= metrics.keys()
    assert json.loads((run_folder / "evaluation.json").read_text()) == result
    assert "--num_samples 20" in (run_folder / "README.md").read_text()
    assert all((run_folder / "evaluation" / name).is_file() for name in result["pictures"].values())
    assert (folder / "runs" / ".evaluation_cache").is_dir()
    done = run(folder, "sample", "--num_images", "4", "--top_k", "3", "--guidance_scale", "2", "--output", "four.png")
    assert done.returncode == 0, done.stderr[-3000:]
    with Image.open(folder / "four.png") as image:
        assert image.width > 4 * 64
    assert re.search(r"^images +4$", done.stdout, re.MULTILINE)
    assert re.search(r"^pictures +four\.png$", done.stdout, re.MULTILINE)
    done = run(folder, "extract_codes", "--split", "test", "--cpu", "true", "--json")
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout)["images"] == metrics["num_images"]
    assert json.loads((run_folder / "codes" / "test" / "spec.json").read_text())["count"] == metrics["num_images"]


def test_samples_are_the_same_on_two_processes_as_on_one(run_folder):
    folder = run_folder.parents[1]
    options = ["--num_images", "5", "--columns", "5", "--guidance_scale", "2", "--min_p", "0.1"]
    options += ["--guidance_schedule", "[0, 0.5]"]
    done = run(folder, "sample", *options, "--output", "one.png", "--animation", "codes.gif")
    assert done.returncode == 0, done.stderr[-3000:]
    done = launch(folder, "sample", *options, "--output", "two.png", num_processes=2)
    assert done.stdout.count("two.png") == 1  # one process speaks
    assert (folder / "one.png").read_bytes() == (folder / "two.png").read_bytes()
    with Image.open(folder / "codes.gif") as animation, Image.open(folder / "one.png") as picture:
        assert animation.n_frames == 17  # of 16 codes, and without any
        assert animation.size == picture.size


def test_a_row_of_samples_is_one_thing_in_several_poses(tmp_path):
    network = {"type": "conv", **tiny.LATENT_NETWORKS["conv"]}
    options = {**tiny.TOKENIZERS["dvaepp"], "network": network}
    torch.manual_seed(0)
    pipeline = Pipeline(TOKENIZERS["dvaepp"](TOKENIZERS["dvaepp"].Config(**options)))
    pipeline.save_pretrained(tmp_path / "p")
    options = ["--run", "p", "--resample", "local", "--columns", "2", "--num_images", "5", "--seed", "1"]
    done = run(tmp_path, "sample", *options, "--output", "one.png")
    assert done.returncode == 0, done.stderr[-3000:]
    launch(tmp_path, "sample", *options, "--output", "two.png", num_processes=2)
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()
    generators = one_generator_each(3, torch.Generator().manual_seed(1))
    rows = [pipeline.sample(2, generator=g, resample="local", output_type="pt") for g in generators]
    save_grid(torch.cat(rows)[:5], tmp_path / "rows.png", columns=2)
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "rows.png").read_bytes()
    for extra, message in [
        (["--class_grid", "true"], "class_grid shows each image's codes"),
        (["--class_labels", "[0, 1]"], "got 2 labels or prompts for 3 rows of 2 images"),
    ]:
        done = run(tmp_path, "sample", *options, *extra)
        assert done.returncode == 1
        assert message in done.stderr
        assert "Traceback" not in done.stderr


def test_an_animation_of_codes_without_a_place_is_refused_before_anything_is_drawn(tmp_path):
    make_pipeline("dvaepp", "gpt").save_pretrained(tmp_path / "run")
    done = run(tmp_path, "sample", "--run", "run", "--animation", "x.gif")
    assert done.returncode == 1
    assert "have no place in it" in done.stderr
    assert not (tmp_path / "samples.png").exists()


def test_a_class_whose_name_is_a_number_is_meant_by_it(tmp_path):
    torch.manual_seed(0)
    pipeline = make_pipeline("vqvae", "gpt", 3)
    pipeline.class_names = ["1", "2", "3"]
    pipeline.save_pretrained(tmp_path / "p")
    image, label = pipeline.sample(1, "2")[0], ["--run", "p", "--class_labels", "2"]
    image.save(tmp_path / "a.png")
    done = run(tmp_path, "sample", *label, "--num_images", "16", "--output", "two.png")
    assert done.returncode == 0, done.stderr[-3000:]
    for name in ("2", "3"):
        images = pipeline.sample(16, name, generator=torch.Generator().manual_seed(0), output_type="pt")
        save_grid(images, tmp_path / "expected.png", columns=8)
        assert ((tmp_path / "two.png").read_bytes() == (tmp_path / "expected.png").read_bytes()) == (name == "2")
    done = run(tmp_path, "complete", *label, "--images", "a.png", "--mask", "bottom", "--json")
    assert done.returncode == 0, done.stderr[-3000:]
    generator = torch.Generator().manual_seed(0)
    expected = pipeline.complete(
        image, named_mask("bottom", pipeline.tokenizer), class_labels="2", num_candidates=4, generator=generator
    )
    assert json.loads(done.stdout)["log_prob"] == expected.log_prob.tolist()


def test_labels_and_prompts_arrive_as_they_are_typed(tmp_path):
    torch.manual_seed(0)
    pipeline = make_pipeline("vqvae", "gpt", 3)
    pipeline.class_names = ["001", "002", "010"]
    pipeline.save_pretrained(tmp_path / "p")
    done = run(tmp_path, "sample", "--run", "p", "--class_labels", "[001, 010]", "--output", "two.png")
    assert done.returncode == 0, done.stderr[-3000:]
    images = pipeline.sample(2, ["001", "010"], generator=torch.Generator().manual_seed(0), output_type="pt")
    save_grid(images, tmp_path / "expected.png", columns=8)
    assert (tmp_path / "two.png").read_bytes() == (tmp_path / "expected.png").read_bytes()
    pipeline.sample(1)[0].save(tmp_path / "a.png")
    for script, options in (("sample", ["--prompts", "#1 dad"]), ("complete", ["--prompts", "null", "--mask", "left"])):
        options += ["--images", "a.png"] if script == "complete" else []
        done = run(tmp_path, script, "--run", "p", *options)
        assert "prompts are for a prior that is conditional on captions" in done.stderr


def test_images_of_a_run_are_not_held_out_anew_where_they_have_changed(tmp_path):
    for number in range(20):
        (tmp_path / "pictures").mkdir(exist_ok=True)
        Image.new("RGB", (8, 8), (number, 0, 0)).save(tmp_path / "pictures" / f"{number:02}.png")
    config = DataConfig(name="folder", root="pictures")
    prepared = load_images(replace(config, root=str(tmp_path / "pictures")), "train")
    make_pipeline("vqvae", "gpt", preprocessing=prepared.preprocessing).save_pretrained(tmp_path / "run")
    save_config(tmp_path / "run/stage_one/config.yaml", {"data": plain(asdict(config))})
    written = {"dataset": prepared.identity, "class_names": prepared.class_names}
    (tmp_path / "run/codes/train").mkdir(parents=True)
    write_json_atomic(tmp_path / "run/codes/train/spec.json", written)
    (tmp_path / "pictures/07.png").rename(tmp_path / "pictures/zz.png")
    for script in ("evaluate", "extract_codes"):
        done = run(tmp_path, script, "--run", "run")
        assert done.returncode == 1
        assert "pictures, or their captions, are not those that run was trained on" in done.stderr
    done = run(tmp_path, "extract_codes", "--run", "run", "--split", "all", "--cpu", "true", "--json")
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout)["images"] == 20


def test_labels_that_fit_the_share_of_a_process_do_not_fit_all_images(run_folder):
    options = ["--num_images", "4", "--class_labels", "[3, 7]"]
    launcher = [*LAUNCH, "--multi_gpu", "--num_processes", "2"]
    done = run(run_folder.parents[1], "sample", *options, launcher=launcher, ACCELERATE_USE_CPU="true")
    assert done.returncode == 1
    assert "got 2 labels or prompts for 4 images; give one per image, or one for all" in done.stderr


def test_images_are_completed_continued_and_interpolated(run_folder, tmp_path):
    images = Pipeline.from_pretrained(run_folder).sample(class_labels=[3, 7])
    mask = Image.new("L", (8, 8))
    mask.putpixel((3, 3), 255)
    for image, name in zip([*images, mask], ("a.png", "b.png", "mask.png")):
        image.save(tmp_path / name)
    cell = 64 + 2  # 8 x 8 pixels, enlarged, and a line between
    mask_options = ["--mask", "mask.png", "--ranking", "importance", "--columns", "2", "--class_labels", "[3, 7]"]
    for options, size in [
        ([*mask_options, "--keep_known_pixels", "true", "--guidance_scale", "2"], (4 * cell, 2 * cell)),
        (["--size", "[8, 16]", "--num_candidates", "2"], (2 * (64 + cell), cell)),
        (["--interpolate", "4"], (4 * cell, cell)),
    ]:
        done = run(tmp_path, "complete", "--run", str(run_folder), "--images", "[a.png, b.png]", *options, "--json")
        assert done.returncode == 0, done.stderr[-3000:]
        assert json.loads(done.stdout)["pictures"] == ["completed.png"]
        with Image.open(tmp_path / "completed.png") as picture:
            assert picture.size == (size[0] + 2, size[1] + 2)


def test_finished_commands_run_again_change_nothing(run_folder):
    weights = [load_file(run_folder / part / "model.safetensors") for part in ("tokenizer", "prior")]
    folder = run_folder.parents[1]
    said = launch(folder, "train_tokenizer", *TINY_TOKENIZER, *SHORT).stdout
    assert "continuing from step 4" in said
    assert re.search(r"^validation\.nll +\d", said, re.MULTILINE)
    said = json.loads(launch(folder, "train_prior", *TINY_PRIOR, *SHORT, "--json", "true").stdout)
    assert said["steps_run"] == 0
    assert said["validation"].keys() >= {"nll", "uniform_nll"}
    assert all((folder / picture).is_file() for picture in said["pictures"])
    for part, before in zip(("tokenizer", "prior"), weights):
        after = load_file(run_folder / part / "model.safetensors")
        assert all(torch.equal(before[name], after[name]) for name in before)
    assert Pipeline.from_pretrained(run_folder).has_stage_two


def test_a_prior_in_a_folder_of_its_own_can_be_evaluated(run_folder, tmp_path):
    done = run(tmp_path, "train_prior", "--run", str(run_folder), "--output", "my own", *TINY_PRIOR, *SHORT)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "python scripts/evaluate.py --run 'my own'" in done.stdout
    done = run(
        tmp_path, "evaluate", "--run", "my own", "--data.max_images", "20", "--metrics", "likelihood", "--ood", "noise"
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "bits_per_dim" in done.stdout
    assert "ood_auroc_noise" in done.stdout
    assert "psnr" not in done.stdout
    done = run(tmp_path, "evaluate", "--run", "my own", "--metrics", "[likelyhood]")
    assert "did you mean 'likelihood'" in done.stderr
    assert done.returncode == 2


def test_codes_of_another_tokenizer_are_refused(run_folder, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(run_folder, other)
    tokenizer = load_tokenizer(other / "tokenizer")
    next(tokenizer.parameters()).data.flatten()[0] += 1
    save_model(tokenizer, other / "tokenizer")
    done = run(tmp_path, "train_prior", "--run", str(other), "--output", "own", *TINY_PRIOR, *SHORT)
    assert done.returncode == 1
    assert not (tmp_path / "own" / "stage_two" / "state").exists()  # before any training
    assert len(done.stderr.strip().splitlines()) == 1
    recorded = json.loads((run_folder / "prior" / "config.json").read_text())["tokenizer_fingerprint"]
    assert recorded in done.stderr
    assert fingerprint(tokenizer) in done.stderr
    # nor is that tokenizer overwritten by the one of another run
    done = run(tmp_path, "train_prior", "--run", str(run_folder), "--output", str(other), *TINY_PRIOR, *SHORT)
    assert "holds another tokenizer" in done.stderr
    assert fingerprint(load_tokenizer(other / "tokenizer")) == fingerprint(tokenizer)
    done = run(tmp_path, "train_prior", "--run", str(run_folder), "--prior.type", "rbm", "--output", "own")
    assert "add --class_conditional false, or take one of " in done.stderr
    assert "gpt, factorial\n" in done.stderr


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        ("train_tokenizer", ["--training.learning_rat", "1"], "did you mean 'training.learning_rate'"),
        ("train_tokenizer", ["--tokenizer.quantizer.type", "ema_qv"], "did you mean 'ema_vq'"),
        ("train_tokenizer", ["--data.name", "MNISTT", "--data.download", "false"], "did you mean MNIST"),
        ("train_tokenizer", ["--training.batch_size", "5000", "--training.cpu", "true"], "larger than the data set"),
        ("train_prior", [], "train a tokenizer first"),
        ("sample", ["--run", "nowhere"], "nowhere is neither a folder nor a hub id"),
        ("sample", ["--run", ""], ". is not a pipeline: it has no model_index.json"),
        ("sample", ["--class_labels", "[]"], "class_labels must hold at least one, got none"),
        ("sample", ["--class_grid", "true", "--prompts", "[]"], "prompts must hold at least one, got none"),
        ("sample", ["--columns", "0"], "columns must be at least 1, got 0"),
        ("sample", ["--num_images", "-1"], "num_images must be at least 1, got -1"),
        ("sample", ["--seed", "99999999999999999999"], "seed must lie in [0, 2^63), got 99999999999999999999"),
        ("sample", ["--class_grid", "true", "--columns", "3"], "leave out --columns"),
        ("complete", ["--images", "x.png", "--mask", "left", "--seed", "-1"], "seed must lie in [0, 2^63), got -1"),
        (
            "complete",
            ["--images", "[x.png, y.png]", "--interpolate", "4", "--batch_size", "2"],
            "--interpolate makes no use of --batch_size; leave it out",
        ),
        (
            "train_tokenizer",
            ["--output", "file"],
            "file/stage_one cannot be a folder, since there is a file in its place",
        ),
        ("train_tokenizer", ["--output", ""], "output must name a folder, got an empty name"),
        ("train_tokenizer", ["--tokenizer.downsample_factor", "3"], "downsample_factor must be a power of two"),
        ("sample", ["--output", "x.jpg"], "name a file that ends in .png"),
        ("sample", ["--output", "file/x.png"], "file/x.png cannot be written: "),
        ("sample", ["--animation", "x.png"], "name a file that ends in .gif"),
        ("sample", ["--guidance_schedule", "linar"], "did you mean 'linear'"),
        ("complete", ["--images", "x.png"], "give exactly one of --mask, --size and --interpolate, got none"),
        ("complete", ["--images", "x.png", "--interpolate", "4"], "interpolation needs at least two images"),
        ("complete", ["--images", "x.png", "--mask", "left"], "x.png: cannot be read as an image"),
        (
            "complete",
            ["--images", "x.png", "--interpolate", "4", "--temperature", "-5", "--position", "[0, 4]"],
            "--interpolate makes no use of --position, --temperature; leave it out",
        ),
        ("complete", ["--images", "x.png", "--size", "[8, 8]", "--ranking", "importance"], "no use of --ranking;"),
    ],
)
def test_a_users_mistake_is_one_line_and_not_a_traceback(script, arguments, message, tmp_path):
    (tmp_path / "file").touch()
    done = run(tmp_path, script, *arguments)
    assert done.returncode in (1, 2)
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize("script", sorted(path.stem for path in (ROOT / "scripts").glob("*.py")))
def test_help_says_what_each_option_is(script, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", [script, "--help"])
    with pytest.raises(SystemExit):
        importlib.import_module(script).main()
    _, *options = re.split(r"\n(?:  (?=-)|\n.*)", capsys.readouterr().out)  # or the title of a group of them
    assert len(options) > 5
    assert not [option for option in options if re.fullmatch(r"\S+( \S+)?\s*(\((type|default): [^)]*\))?\s*", option)]


def test_a_users_mistake_is_one_line_on_two_processes_too(tmp_path):
    launcher = [*LAUNCH, "--multi_gpu", "--num_processes", "2"]
    arguments = ["--data.name", "folder", "--data.root", "nowhere", "--training.cpu", "true"]
    done = run(tmp_path, "train_tokenizer", *arguments, launcher=launcher, ACCELERATE_USE_CPU="true")
    assert done.returncode == 1
    assert done.stderr.count("is not a folder; set root") == 1
    assert "[rank1]" not in done.stderr


def test_an_evaluation_of_models_that_were_trained_anew_meanwhile_is_not_recorded(run_folder, tmp_path, monkeypatch):
    folder = shutil.copytree(run_folder, tmp_path / "run")
    index = (folder / "model_index.json").read_text()

    def measured_while_another_trains(pipeline, *arguments, **options):
        result = evaluate(pipeline, *arguments, **options)
        prior = pipeline.prior
        next(prior.parameters()).data.add_(1)
        save_model(prior, folder / "prior")
        return result

    monkeypatch.setattr(evaluate_script, "evaluate", measured_while_another_trains)
    monkeypatch.setattr("sys.argv", ["evaluate.py", "--run", str(folder), "--metrics", "codebook", "--device", "cpu"])
    with pytest.raises(ValueError, match="were trained anew while the old ones were measured"):
        evaluate_script.main()
    assert (folder / "model_index.json").read_text() == index


def test_a_prior_whose_tokenizer_was_trained_anew_meanwhile_enters_no_pipeline(run_folder, tmp_path, monkeypatch):
    folder = shutil.copytree(run_folder, tmp_path / "run")
    shutil.rmtree(folder / "stage_two")
    index, prior = (folder / "model_index.json").read_text(), load_file(folder / "prior" / "model.safetensors")

    def trained_while_another_trains(*arguments, **options):
        result = fit(*arguments, **options)
        tokenizer = load_tokenizer(folder / "tokenizer")
        next(tokenizer.parameters()).data.add_(1)
        save_model(tokenizer, folder / "tokenizer")
        return result

    monkeypatch.setattr(train_prior_script, "fit", trained_while_another_trains)
    monkeypatch.setattr(
        "sys.argv", ["train_prior.py", "--run", str(folder), *TINY_PRIOR, *SHORT, "--training.seed", "9"]
    )
    with pytest.raises(ValueError, match="was trained anew while this prior trained on the old one's codes"):
        train_prior_script.main()
    assert (folder / "model_index.json").read_text() == index
    assert all(torch.equal(value, prior[name]) for name, value in load_file(folder / "prior/model.safetensors").items())


def test_files_that_a_model_would_delete_are_found_before_training(run_folder, tmp_path):
    folder = shutil.copytree(run_folder, tmp_path / "run")
    done = run(tmp_path, "extract_codes", "--run", "run", "--output", "run/tokenizer")
    assert "run/tokenizer is a model's folder (it has config.json), which codes would spoil" in done.stderr
    for name, script, options in (("tokenizer", "train_tokenizer", ["--output", "run", *TINY_TOKENIZER]),
                                  ("prior", "train_prior", ["--run", "run", *TINY_PRIOR])):  # fmt: skip
        (folder / name / "notes.txt").touch()
        done = run(tmp_path, script, *options, *SHORT, "--training.total_steps", "6")
        assert done.returncode == 1
        assert f"run/{name} holds other files than a model's (notes.txt); move them away" in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1
        assert not list(folder.glob("stage_*/state/step-00000006"))
        (folder / name / "notes.txt").unlink()


def test_memorisation_is_of_the_images_that_the_model_was_trained_on(run_folder):
    images = load_images(DataConfig(name="digits", max_images=100), "train")
    assert was_trained_on(run_folder, images)
    assert not was_trained_on(run_folder, load_images(DataConfig(name="digits", max_images=99), "train"))
    pipeline = Pipeline.from_pretrained(run_folder)
    held_out = load_images(DataConfig(name="digits"), "test")
    result = evaluate(pipeline, held_out, images, trained_on_them=False, num_samples=10,
                      metrics=["likelihood", "memorisation"])  # fmt: skip
    assert "are not those that the model was trained on" in result["not_measured"]["memorisation"]
    assert not {"copying", "nearest_train_sample"} & result["metrics"].keys()


def test_an_unusable_device_is_refused_with_those_that_can_be_used():
    assert choose_device("cpu") == torch.device("cpu")
    for name in ("gpu", "xla", "cuda:99"):
        with pytest.raises(ValueError, match=f"device '{name}' cannot be used here; take cpu"):
            choose_device(name)


def test_pictures_that_are_left_out_are_named_and_counted(tmp_path, capsys):
    for number in range(20):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(tmp_path / f"{number:02}.png")
    (tmp_path / "07.png").write_text("no")
    config = DataConfig(name="folder", root=str(tmp_path), on_bad_image="skip")
    data_sets = [load_images(config, split) for split in ("train", "validation", "test")]
    say_skipped(*data_sets)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("left out 1 unreadable of ")
    assert line.endswith(str(tmp_path / "07.png"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_recipe_builds_its_model(path):
    recipe = yaml.safe_load(path.read_text())

    class Options:
        """None."""

    if "prior" in recipe:
        config = parse(
            "", {"prior": Polymorphic(PRIORS, "gpt"), "training": TrainingConfig}, Options, ["--config", str(path)]
        )
        with torch.device("meta"):
            model = build_prior({**config["prior"], "spec": CodeSpec(((4, 4),), (8,)), "num_classes": 2})
    else:
        sections = {"data": DataConfig, "tokenizer": Polymorphic(TOKENIZERS, "vqvae"), "training": TrainingConfig}
        config = parse("", sections, Options, ["--config", str(path)])
        DataConfig(**config["data"])
        with torch.device("meta"):
            model = build_tokenizer({**config["tokenizer"], "image_shape": (3, 32, 32)})
    TrainingConfig(**config["training"])
    assert sum(p.numel() for p in model.parameters()) > 0
    assert "accelerate launch scripts/train_" in path.read_text()


def test_a_launcher_that_is_stopped_leaves_a_state_and_no_orphan(tmp_path):
    command = [sys.executable, *LAUNCH, "--num_processes", "1", str(ROOT / "scripts" / "train_tokenizer.py")]
    options = [*TINY_TOKENIZER, "--training.total_steps", "1000000", "--training.eval_every", "5", "--output", "run"]
    log = (tmp_path / "log").open("w")
    launcher = subprocess.Popen([*command, *options], cwd=tmp_path, env=ENVIRONMENT, stdout=log, stderr=log)
    log.close()
    wait_for(lambda: (tmp_path / "run/stage_one/log.jsonl").exists(), "the first evaluation")
    launcher.terminate()
    launcher.wait(60)
    wait_for(lambda: "state saved" in (tmp_path / "log").read_text(), "the saved state")
    wait_for(lambda: not (tmp_path / "run/stage_one/.lock-owner.json").exists(), "the process's end")
    assert len(list((tmp_path / "run/stage_one/state").glob("step-*"))) == 1


def wait_for(condition, what: str, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"waited {seconds} s for {what}"
        time.sleep(0.1)
