"""The benchmark script: every sub-command as a real process at its smallest sizes, and what it measures with."""

import argparse
import gc
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from benchmark import ON_GPU, default_output, print_summary, run
from benchmarks import boltzmann, codes, quantizer, sampling, tokenizer, training
from benchmarks.measure import Clock, Timing, compare, peak_memory
from benchmarks.peers import Peers, load
from benchmarks.report import Case, Report, place

from tests.allocation import MEGABYTES, allocation

ROOT = Path(__file__).resolve().parents[1]


def benchmark(output: Path, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "scripts" / "benchmark.py"), *arguments, "--output", str(output)]
    command += ["--sizes", "quick", "--rounds", "1", "--memory_limit_gb", "0"]
    environment = {**os.environ, "PYTHONWARNINGS": "error::UserWarning:benchmarks"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=200, check=False)


def quick_run(folder: Path, name: str) -> list[dict]:
    """The cases of a run, after a look at everything that all benchmarks have in common."""
    done = benchmark(folder, name)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    results, table = json.loads((folder / f"{name}.json").read_text()), (folder / f"{name}.md").read_text()
    assert (results["clock"], results["rounds"], results["machine"]["threads"]) == ("CPU time", 1, 1)
    assert results["versions"]["torch"] == torch.__version__
    assert all(rate > 0 for rate in results["floors"].values())
    assert results["date"] in table
    assert str(ROOT) not in table + json.dumps(results)
    for case in results["cases"]:
        title = ", ".join(f"{key} {value}" for key, value in case["parameters"].items())
        assert f"\n## {title}\n" in table
        assert title in done.stdout
        assert case["seconds"] or case["checks"]
        assert all(seconds > 0 for seconds in case["seconds"].values())
        for reference, ratios in case["ratios"].items():
            assert ratios[reference] == [1, 1, 1]
            assert ratios.keys() == case["seconds"].keys()
            assert all(f"| {candidate} | " in table for candidate in ratios)
    return results["cases"]


def test_quantizer_benchmark_finds_no_mismatch(tmp_path):
    (case,) = quick_run(tmp_path, "quantizer")
    assert case["checks"]["codes that differ from the whole matrix's"] == 0
    assert case["checks"]["largest error of the running averages, of their largest entry"] < 1e-5
    assert {quantizer.OURS, quantizer.FLOOR, "vector-quantize-pytorch EMA"} <= case["seconds"].keys()


def test_tokenizer_benchmark(tmp_path):
    (case,) = quick_run(tmp_path, "tokenizer")
    seconds = case["seconds"]["tessera"]
    assert case["checks"]["images per second"] == pytest.approx(case["parameters"]["images"] / seconds)


def test_sampling_benchmark_holds_all_three_priors_against_something(tmp_path):
    cases = quick_run(tmp_path, "sampling")
    assert [case["parameters"]["model"] for case in cases] == ["gpt", "pixelcnn", "pixelsnail"]
    assert all(sampling.OURS in case["seconds"] and len(case["seconds"]) > 1 for case in cases)
    gpt, ours = cases[0], cases[0]["seconds"][sampling.OURS]
    assert gpt["checks"]["fraction of the floor's speed"] == pytest.approx(gpt["seconds"][sampling.FLOOR] / ours)


def test_codes_benchmark_writes_and_reads(tmp_path):
    write, *reads = quick_run(tmp_path, "codes")
    assert [read["parameters"]["batch"] for read in reads] == [64, 512]
    assert write["checks"]["bytes per image"] > 160  # 4x4 and 8x8 codes of 16 bits


def test_boltzmann_benchmark_splits_a_step(tmp_path):
    sweep, step = quick_run(tmp_path, "boltzmann")
    assert {boltzmann.OURS, boltzmann.USUAL, boltzmann.FLOOR} < sweep["seconds"].keys()
    parts = {boltzmann.NETWORK, boltzmann.SWEEPS, boltzmann.PRODUCTS, boltzmann.STEP_FLOOR}
    assert parts < step["seconds"].keys()


def test_training_benchmark_times_the_loop_and_the_start(tmp_path):
    loop, start = quick_run(tmp_path, "training")
    assert len(loop["seconds"]) == 2
    assert all(seconds > 0 for seconds in start["checks"].values())
    loading, importing = "CPU seconds of from_pretrained beyond it", "CPU seconds of the import"
    assert start["checks"][loading] < start["checks"][importing]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", ON_GPU)
def test_benchmarks_of_a_gpu(name, tmp_path):
    done = benchmark(tmp_path, name, "--device", "cuda")
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads((tmp_path / f"{name}-cuda.json").read_text())
    assert results["clock"] == "wall time"
    assert torch.cuda.get_device_name() in (tmp_path / f"{name}-cuda.md").read_text()
    assert results["cases"]


def test_a_mistake_ends_with_one_line(tmp_path):
    done = benchmark(tmp_path, "boltzmann", "--only", "no such case")
    assert done.returncode == 1
    assert done.stderr == (
        "error: no case of boltzmann has 'no such case' in its title; its cases are 'units of a side 4, chains 8', "
        "'step of DVAE++ 2~, images 4, bits 16, chains 8, sweeps 2'\n"
    )
    assert not list(tmp_path.iterdir())


def arguments(folder: Path, **changed) -> argparse.Namespace:
    usual = {"benchmark": "boltzmann", "peer": [], "threads": 1, "device": "cpu", "rounds": 1, "sizes": "quick"}
    return argparse.Namespace(**{**usual, "only": "", "memory_limit_gb": 0.0, "output": folder, **changed})


def test_only_the_cases_asked_for_are_run(tmp_path):
    run(arguments(tmp_path, only="units of"))
    (case,) = json.loads((tmp_path / "boltzmann-units-of.json").read_text())["cases"]
    assert "units of a side" in case["parameters"]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"rounds": 0}, "--rounds must be at least 1, got 0"),
        ({"threads": 0}, "--threads must be at least 1, got 0"),
        ({"memory_limit_gb": -1.0}, "--memory_limit_gb must be at least 0, got -1.0"),
        (
            {"device": "cuda"},
            "boltzmann is for CPUs; --device cuda is known to quantizer, tokenizer, sampling, training",
        ),
        pytest.param(
            {"benchmark": "quantizer", "device": "cuda"}, "torch finds no GPU here; leave it out to run on the CPU",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_measured_is_refused(changed, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        run(arguments(tmp_path, **changed))


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("lucidrains=.", "unknown peer 'lucidrains'; choose from rosinality, llamagen, taming, ritheshkumar95"),
        ("rosinality={folder}", "is not a work tree of rosinality, it has no vqvae.py"),
        ("rosinality", "write --peer rosinality=FOLDER"),
    ],
)
def test_peer_errors_say_what_is_wanted(option, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        Peers([option.format(folder=tmp_path)])


def test_work_trees_do_not_see_each_others_modules(tmp_path):
    for name in ("one", "other"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "parts.py").write_text(f"NAME = '{name}'")
        (folder / "vqvae.py").write_text("from parts import NAME")
    loaded = [load(str(tmp_path / name), "vqvae").NAME for name in ("one", "other", "one")]
    assert loaded == ["one", "other", "one"]
    assert not {"parts", "vqvae"} & sys.modules.keys()
    assert str(tmp_path / "one") not in sys.path


def test_a_work_trees_commit_is_noted(tmp_path):
    (tmp_path / "vqvae.py").touch()
    assert Peers([f"rosinality={tmp_path}"]).versions() == {}
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=b"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "one"]):
        subprocess.run([*git, *command], check=True)
    commit = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout
    versions = Peers([f"rosinality={tmp_path}"]).versions()
    assert commit.startswith(versions["rosinality"])
    assert len(versions["rosinality"]) >= 7
    (tmp_path / "part").mkdir()
    (tmp_path / "part" / "vqvae.py").touch()
    assert Peers([f"rosinality={tmp_path / 'part'}"]).versions() == {}


# Timing
# ------------------------------------------------------------------------------------------------


class Watch:
    """A clock that moves when candidates say so."""

    def __init__(self):
        self.now, self.order = 0.0, []

    def __call__(self) -> float:
        return self.now

    def candidate(self, name: str, seconds: list[float]):
        """Takes the given seconds, one call after the other, and the last of them from then on."""
        seconds = list(seconds)

        def run():
            self.order.append(name)
            self.now += seconds.pop(0) if len(seconds) > 1 else seconds[0]

        return run


def test_ratios_are_taken_within_rounds():
    watch = Watch()
    candidates = {
        "slow": watch.candidate("slow", [2, 2, 4, 20]),  # one call before, one round after the other
        "fast": watch.candidate("fast", [1, 1, 1, 10]),
    }
    timings = compare(candidates, watch, rounds=3)
    assert timings["slow"].seconds == [2, 4, 20]
    assert timings["slow"].ratios(timings["fast"]) == [2, 2, 3]
    assert timings["fast"].median == 1
    assert watch.order == ["slow", "fast", "slow", "fast", "fast", "slow", "slow", "fast"]  # turned every round


def test_a_rounds_time_is_divided_by_that_of_the_same_round():
    assert Timing([1.0, 4.0]).ratios(Timing([2.0, 1.0])) == [1.375, 2.25, 3.125]  # of 1/2 and 4


@pytest.mark.parametrize(
    ("changed", "folder"),
    [
        ({"sizes": "full"}, ""),
        ({"sizes": "full", "threads": 2}, "2_threads"),
        ({"sizes": "quick"}, "quick"),
        ({"sizes": "quick", "threads": 2}, "quick/2_threads"),
    ],
)
def test_a_try_out_takes_the_place_of_no_published_table(changed, folder):
    published = ROOT / "scripts" / "benchmark_results"
    assert default_output(arguments(None, **changed)) == published / folder


def test_quick_candidates_are_called_several_times():
    watch = Watch()
    timings = compare({"one": watch.candidate("one", [0.5, 0.25])}, watch, rounds=1, shortest=1.0)
    assert timings["one"].seconds == [0.25]
    assert len(watch.order) == 2 + 4


def test_quartiles_of_a_single_round_are_its_ratio():
    assert Timing([3.0]).ratios(Timing([2.0])) == [1.5, 1.5, 1.5]


def test_one_thread_is_timed_by_its_own_work():
    gc.collect()  # it may take as long as what is timed
    clock, start = Clock(1), Clock(1)()
    subprocess.run([sys.executable, "-c", "import time; time.sleep(0.3)"], check=True)
    assert clock() - start < 0.1
    assert (clock.name, Clock(2).name) == ("CPU time", "wall time")
    start = Clock(2)()
    subprocess.run([sys.executable, "-c", "import time; time.sleep(0.3)"], check=True)
    assert Clock(2)() - start > 0.3


def test_a_gpu_is_timed_by_the_clock_on_the_wall(monkeypatch):
    waited = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waited.append(True))
    clock = Clock(1, "cuda")
    start = clock()
    subprocess.run([sys.executable, "-c", "import time; time.sleep(0.3)"], check=True)
    assert clock() - start > 0.3
    assert len(waited) == 2
    assert clock.name == "wall time"


# Memory
# ------------------------------------------------------------------------------------------------


def test_peak_memory_is_that_of_the_call():
    peak = peak_memory(allocation, (100,), (1,), limit_gb=4.0)
    assert 98 * MEGABYTES <= peak < 110 * MEGABYTES


def test_what_was_taken_before_does_not_count():
    assert peak_memory(allocation, (50,), (300,), limit_gb=4.0) < 60 * MEGABYTES


def test_what_does_not_fit_has_no_peak():
    assert peak_memory(allocation, (2000,), (1,), limit_gb=1.0) is None


def test_other_errors_are_not_taken_for_a_lack_of_memory():
    with pytest.raises(RuntimeError, match=r"allocation\(-1,\): less than nothing"):
        peak_memory(allocation, (-1,), (1,), limit_gb=1.0)


# Reports
# ------------------------------------------------------------------------------------------------


@pytest.fixture
def report():
    report = Report("made-up", Peers([]), Clock(1), rounds=2, memory_gb=1.0)
    timings = {"tessera": Timing([0.001, 0.002]), "a peer": Timing([0.003, 0.004]), "floor": Timing([0.0005, 0.001])}
    case = Case({"vectors": 7, "what": "a case with so long a title that it does not fit above one of three charts"})
    case.add(timings, references=("tessera", "not there"))
    case.peak_bytes = {"tessera": 5_000_000, "a peer": None}
    case.checks = {"mismatches": 0}
    report.add(case)
    return report


def test_tables_say_time_ratio_and_memory(report, tmp_path):
    report.write(tmp_path)
    lines = (tmp_path / "made-up.md").read_text().splitlines()
    assert "|  | ms | x tessera | peak MB |" in lines
    assert "| tessera | 1.5 | 1 (1-1) | 5 |" in lines
    assert "| a peer | 3.5 | 2.5 (2.25-2.75) | over the limit |" in lines
    assert "| floor | 0.75 | 0.5 (0.5-0.5) | - |" in lines
    assert "- mismatches: 0" in lines


def test_a_run_that_is_stopped_leaves_the_cases_that_it_had(tmp_path):
    report = Report("made-up", Peers([]), Clock(1), rounds=1, memory_gb=1.0, folder=tmp_path / "new")
    unfinished = tmp_path / "new" / "made-up.unfinished.json"
    for number in (1, 2):
        report.add(Case({"number": number}, checks={"seconds": 1.5}))
        assert len(json.loads(unfinished.read_text())["cases"]) == number
    report.write(tmp_path / "new")
    assert json.loads(unfinished.with_name("made-up.json").read_text())["cases"][1]["parameters"] == {"number": 2}
    assert not unfinished.exists()


def test_results_of_a_gpu_bear_its_name():
    machine = {"cpu": "a CPU", "threads": 2}
    assert place({"machine": machine, "clock": "wall time"}) == "a CPU, wall time of 2 threads"
    assert place({"machine": {**machine, "gpu": "a GPU"}, "clock": "wall time"}) == "a GPU, wall time"


def test_charts_are_drawn_without_a_warning(report, tmp_path):
    report.write(tmp_path)  # warnings are errors here
    assert (tmp_path / "made-up.png").stat().st_size > 5000


def test_without_matplotlib_the_tables_are_written_all_the_same(report, tmp_path, monkeypatch, capsys):
    monkeypatch.delitem(sys.modules, "benchmarks.chart", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # as Python has it where an import failed
    report.write(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["made-up.json", "made-up.md"]
    assert "no chart: pip install 'tessera-codes[bench]'" in capsys.readouterr().out


# Floors and checks
# ------------------------------------------------------------------------------------------------


def multiplications(function) -> int:
    with boltzmann.Recorded() as recorded:
        function()
    return sum(shape[0] * shape[1] * other[1] for (shape, _), (other, _) in recorded.products)


def test_recorded_products_are_those_of_forward_and_backward():
    layer, x = torch.nn.Linear(3, 5), torch.ones(2, 3)
    assert multiplications(lambda: layer(x)) == 2 * 3 * 5
    assert multiplications(lambda: layer(x).sum().backward()) == 2 * 2 * 3 * 5  # x wants no gradient
    assert multiplications(lambda: F.linear(x, layer.weight)) == 2 * 3 * 5
    assert multiplications(lambda: torch.ones(2, 5).addmm_(x, layer.weight.detach().T)) == 2 * 3 * 5
    with torch.inference_mode():
        assert multiplications(lambda: F.linear(x, layer.weight)) == 2 * 3 * 5


@pytest.mark.parametrize("intel", [True, False])
def test_the_floor_of_a_gpt_does_all_its_products_and_no_more(intel, monkeypatch):
    monkeypatch.setattr("prior.gpt_decoder.on_intel", lambda: intel)
    ours, floor = (make(sampling.GPTS["gpt"], 1, 2) for make in (sampling.gpt, sampling.gpt_floor))
    assert multiplications(floor) == multiplications(ours)


def test_the_floor_of_a_boltzmann_step_holds_its_sweeps_and_its_network():
    whole = boltzmann.step(4, 8, 8, 2)
    assert multiplications(boltzmann.products(whole)) == multiplications(whole)
    more = multiplications(boltzmann.step(4, 8, 8, 3)) - multiplications(whole)
    assert more == 2 * 8 * 8 * 8  # a sweep of 8 chains, two sides of 8 units


def test_the_rate_of_a_gpts_training_is_that_of_its_products():
    step, operations = training.gpt_step(sampling.GPTS["gpt"], batch=2, side=2, compiled=False)
    assert operations == 2 * multiplications(step)  # attention's, which are few, are counted on a GPU alone
    case = Case({})
    training.run_gpt(case, Clock(1), 1, "gpt", 2, 2, gemm_gflops=100.0)
    seconds, checks = case.seconds["tessera"], case.checks
    assert checks["codes per second"] == pytest.approx(8 / seconds)
    assert checks["TFLOP/s"] == pytest.approx(operations / seconds / 1e12)
    assert checks["of the rate of a bare GEMM"] == pytest.approx(checks["TFLOP/s"] / 0.1)


def test_the_rate_of_a_tokenizers_training_is_that_of_its_products():
    case, size = Case({}), tokenizer.VQ16_SIZES["quick"]
    tokenizer.run_vq16(case, Clock(1), 1, size, gemm_gflops=100.0, memory_gb=0.0)
    assert case.seconds.keys() == {tokenizer.OURS, tokenizer.QUANTIZER}  # compiled on a GPU alone
    seconds, checks = case.seconds[tokenizer.OURS], case.checks
    operations = tokenizer.operations(tokenizer.vq16(*size))
    assert checks["images per second"] == pytest.approx(size[0] / seconds)
    assert checks["TFLOP/s"] == pytest.approx(operations / seconds / 1e12)
    assert checks["of the rate of a bare GEMM"] == pytest.approx(checks["TFLOP/s"] / 0.1)
    share = case.seconds[tokenizer.QUANTIZER] / seconds
    assert checks["share of the step that the quantizer takes"] == pytest.approx(share)


def test_operations_are_those_of_forward_and_backward():
    layer, x = torch.nn.Linear(3, 5), torch.ones(2, 3)
    assert tokenizer.operations(lambda: layer(x).sum().backward()) == 2 * 2 * 2 * 3 * 5  # x wants no gradient


def test_the_quantizers_step_is_that_of_the_whole_tokenizer(monkeypatch):
    seen, batch, side, channels, num_codes = [], *tokenizer.VQ16_SIZES["quick"]
    whole = tokenizer.vq16(batch, side, channels, num_codes)
    forward = quantizer.EMAVQ.forward

    def noted(self, h, *arguments):
        seen.append((self.codebook.shape, h.shape, h.stride(), h.dtype))
        return forward(self, h, *arguments)

    monkeypatch.setattr(quantizer.EMAVQ, "forward", noted)
    whole()
    tokenizer.vq16_quantizer(batch, side, channels, num_codes)()
    assert len(set(seen)) == 1
    assert seen[0][:2] == ((num_codes, 8), (batch, 8, side // 16, side // 16))


def test_a_step_of_dvaepp_is_timed():
    case = Case({})
    tokenizer.run_dvaepp(case, Clock(1), 1, tokenizer.DVAEPP_SIZES["quick"], memory_gb=0.0)
    assert case.checks["steps per second"] == pytest.approx(1 / case.seconds[tokenizer.OURS])


def test_candidates_are_compiled_on_a_gpu_alone():
    endings = (tokenizer.COMPILED, tokenizer.GRAPHS)
    gpu, cpu = (tokenizer.in_modes(clock, "a", endings, dict, 1) for clock in (Clock(1, "cuda"), Clock(1)))
    assert cpu == {"a": (dict, (1, None))}
    assert gpu == {
        "a": (dict, (1, None)),
        "a compiled": (dict, (1, "default")),
        "a in CUDA graphs": (dict, (1, "reduce-overhead")),
    }


def test_what_cannot_be_compiled_is_noted_and_left_out(capsys):
    counters, called = torch._dynamo.utils.counters["inductor"], []

    def fails():
        raise RuntimeError("overwritten by a later run")

    def skips():
        called.append(True)
        counters["cudagraph_skips"] += len(called) == 1

    case, candidates = Case({}), {"a": fails, "a compiled": fails, "a in CUDA graphs": skips}
    tokenizer.warm_up(case, candidates)
    assert candidates == {"a": fails, "a in CUDA graphs": skips}  # the first is not compiled, so it was not called
    assert case.checks == {"failures of a compiled": 1, "CUDA graphs skipped, a in CUDA graphs": 1}
    assert "a compiled is left out: RuntimeError: overwritten by a later run" in capsys.readouterr().out
    assert len(called) == tokenizer.WARM_UP


def test_a_quantizers_problem_is_the_same_wherever_it_is_put():
    with torch.device("meta"):
        elsewhere = quantizer.Problem(64, 16, 8)
        assert {tensor.device.type for tensor in (*vars(elsewhere).values(),) if hasattr(tensor, "device")} == {"meta"}
        assert quantizer.ema_vq(elsewhere).codebook.device.type == "meta"
    assert torch.equal(quantizer.Problem(64, 16, 8).codebook, quantizer.Problem(64, 16, 8).codebook)


def test_a_wrong_code_is_counted(monkeypatch):
    codes, averages = quantizer.exactness((64, 16, 8)).values()
    assert codes == 0
    assert averages < 1e-6

    def first_of_two(vectors, codebook):
        found = quantizer.torch.cdist(vectors, codebook).argmin(dim=1)
        found[:3] = (found[:3] + 1) % len(codebook)
        return found

    monkeypatch.setattr(quantizer, "nearest", first_of_two)
    assert quantizer.exactness((64, 16, 8))["codes that differ from the whole matrix's"] == 3


def test_bytes_are_those_of_disk_blocks(tmp_path):
    (tmp_path / "full").write_bytes(bytes(range(256)) * 1000)
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(2**30)
    os.sync()
    assert 256_000 <= codes._bytes(tmp_path) < 400_000


def test_peers_that_are_not_installed_take_no_part():
    peers = types.SimpleNamespace(has=lambda name: False, folders={})
    assert list(quantizer.names(peers)) == [quantizer.OURS, quantizer.FLOOR]
    assert list(quantizer.names(types.SimpleNamespace(has=lambda name: name == "taming", folders={"taming": "x"}))) == [
        quantizer.OURS,
        "taming gradient",
        quantizer.FLOOR,
    ]


def test_the_summary_puts_ours_beside_the_fastest_other(tmp_path, capsys):
    report = Report("quantizer", Peers([]), Clock(1), rounds=1, memory_gb=1.0)
    for dim, times in ((8, (0.002, 0.004, 0.003, 0.001)), (64, (0.005, 0.01, 0.03, 0.004))):
        case = Case({"vectors": 7, "dim": dim})
        names = ("tessera", "one", "other", "floor: its products")
        timings = {name: Timing([seconds]) for name, seconds in zip(names, times)}
        case.add(timings, references=("tessera", "floor: its products"))
        case.peak_bytes = {"tessera": 2_000_000, "one": None, "other": 7_000_000}
        report.add(case)
    report.add(Case({"what": "start"}, checks={"seconds": 1.5}))
    report.write(tmp_path)
    capsys.readouterr()
    print_summary(tmp_path)
    lines = capsys.readouterr().out.splitlines()
    head = report.head
    assert lines[0] == (
        f"**Train step of a vector quantizer** ({head['date']}, {head['machine']['cpu']}, CPU time of 1 thread)"
    )
    assert lines[2] == "| case | ms | fastest other | its time / ours | our time / floor | peak MB | its peak MB |"
    assert lines[4] == (
        "| vectors 7, dim 8 / 64 | 2 / 5 | other, one | 1.50 / 2.00 | 2.00 / 1.25 | 2 / 2 | 7 / over the limit |"
    )
    assert "- seconds: 1.5" in lines


def test_the_summary_takes_all_runs_of_a_benchmark_and_names_their_gpu(tmp_path, capsys):
    for only, gpu in (("", "a GPU"), ("dim 8", "another GPU")):
        report = Report("quantizer", Peers([]), Clock(1), rounds=1, memory_gb=1.0, only=only)
        report.head["machine"]["gpu"] = gpu
        case = Case({"vectors": 7, "dim": 8})
        case.add({"tessera": Timing([0.25])}, references=())
        report.add(case)
        report.write(tmp_path)
    (tmp_path / "quantizer.unfinished.json").write_text((tmp_path / "quantizer.json").read_text())
    capsys.readouterr()
    print_summary(tmp_path)
    lines = capsys.readouterr().out.splitlines()
    titles = [line for line in lines if line.startswith("**")]
    assert [title.partition(", ")[2] for title in titles] == ["another GPU, CPU time)", "a GPU, CPU time)"]
    assert lines.count("| vectors 7, dim 8 | 250 |") == 2


def test_a_summary_of_nothing_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"has no results; run scripts/benchmark\.py quantizer first"):
        print_summary(tmp_path)
