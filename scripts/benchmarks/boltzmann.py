"""Block Gibbs sampling of a restricted Boltzmann machine, and a training step of DVAE++ around it.

A sweep draws all units of both sides once.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.measure import Clock, compare
from benchmarks.peers import Peers
from benchmarks.report import Case, Report
from benchmarks.tokenizer import train_step
from prior.boltzmann_samplers import BlockGibbs, Boltzmann
from tokenizer.dvaepp import DVAEPP, DVAEPPConfig

SIZES = {"quick": [(4, 8)], "full": [(200, 1000)]}  # units of a side, chains
OURS, USUAL, FLOOR = "tessera", "sigmoid and torch.bernoulli", "floor: two addmm"
# images, bits of each of two groups, chains, sweeps of a training step
STEP_SIZES = {"quick": (4, 8, 8, 2), "full": (100, 200, 1000, 40)}
NETWORK, SWEEPS = "part: the step with one chain and one sweep", "part: the sweeps alone"
STEP_FLOOR, PRODUCTS = "floor: matrix products and random bits", "floor: matrix products"


class Machine:
    """Parameters of a machine and the states of its chains."""

    def __init__(self, units: int, chains: int):
        generator = torch.Generator().manual_seed(0)
        self.weight = 0.1 * torch.randn(units, units, generator=generator)
        self.bias = torch.zeros(units)
        self.left = torch.randint(2, (chains, units), generator=generator).float()
        self.right = torch.randint(2, (chains, units), generator=generator).float()


def ours(machine: Machine) -> Callable:
    gibbs = BlockGibbs(machine.left.clone(), machine.right.clone())
    parameters = Boltzmann(machine.weight, machine.bias, machine.bias)
    return torch.no_grad()(lambda: gibbs.sweep(parameters))


def usual(machine: Machine) -> Callable:
    state = {"left": machine.left}

    @torch.no_grad()
    def run():
        right = torch.bernoulli(torch.sigmoid(state["left"] @ machine.weight + machine.bias))
        state["left"] = torch.bernoulli(torch.sigmoid(right @ machine.weight.T + machine.bias))

    return run


def thresholds(machine: Machine) -> Callable:
    """float32 uniforms below the probabilities, in buffers that are kept."""
    left, right, uniform = machine.left.clone(), machine.right.clone(), torch.empty_like(machine.left)

    @torch.no_grad()
    def run():
        for source, weight, target in ((left, machine.weight, right), (right, machine.weight.T, left)):
            torch.addmm(machine.bias, source, weight, out=target)
            torch.lt(uniform.uniform_(), target.sigmoid_(), out=target)

    return run


def numpy(machine: Machine) -> Callable:
    generator = np.random.Generator(np.random.SFC64(0))
    weight, state = machine.weight.numpy(), {"left": machine.left.numpy()}

    def draw(logits: np.ndarray) -> np.ndarray:
        uniform = generator.random(logits.shape, dtype=np.float32)
        return (uniform < 1 / (1 + np.exp(-logits))).astype(np.float32)

    def run():
        state["left"] = draw(draw(state["left"] @ weight) @ weight.T)

    return run


def floor(machine: Machine) -> Callable:
    out = torch.empty_like(machine.left)

    @torch.no_grad()
    def run():
        torch.addmm(machine.bias, machine.left, machine.weight, out=out)
        torch.addmm(machine.bias, machine.right, machine.weight.T, out=out)

    return run


# A training step of DVAE++ with two groups of bits, 2~ (Vahdat et al. 2018, arXiv:1802.04920), on 28x28 pixels
# ------------------------------------------------------------------------------------------------


def step(batch: int, bits: int, chains: int, sweeps: int) -> Callable:
    torch.manual_seed(0)
    prior = {"type": "rbm", "num_chains": chains, "num_sweeps": sweeps}
    config = DVAEPPConfig(image_shape=(1, 28, 28), num_groups=2, bits_per_group=bits, prior=prior)
    return train_step(DVAEPP(config), torch.randint(2, (batch, 1, 28, 28)).float(), mode=None)


class Recorded(TorchDispatchMode):
    """Notes the matrix products of what runs in it: sizes and strides of both factors."""

    def __init__(self):
        super().__init__()
        self.products: list[tuple] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function._can_decompose():  # inference mode hands such operations on whole
            with self:
                return function.decompose(*args, **(kwargs or {}))
        if function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_):
            self.products.append(tuple((tuple(factor.shape), factor.stride()) for factor in args[-2:]))
        return function(*args, **(kwargs or {}))


def products(whole: Callable) -> Callable:
    """The matrix products of a step and nothing else."""
    with Recorded() as recorded:
        whole()
    factors = {
        layout: torch.empty_strided(*layout).normal_() for layouts in set(recorded.products) for layout in layouts
    }
    outputs = {(one[0][0], other[0][1]): None for one, other in recorded.products}
    outputs = {shape: torch.empty(shape) for shape in outputs}
    calls = [(factors[a], factors[b], outputs[a[0][0], b[0][1]]) for a, b in recorded.products]

    def run():
        for one, other, out in calls:
            torch.mm(one, other, out=out)

    return run


def random_bits(bits: int, chains: int, sweeps: int) -> Callable:
    """16 for each unit that the chains draw, in the form that torch makes fastest."""
    words = torch.empty(-(-chains * bits // 4), dtype=torch.int64)

    def run():
        for _ in range(2 * sweeps):
            words.random_(-(2**63), None)

    return run


def run_step(case: Case, clock: Clock, rounds: int, batch: int, bits: int, chains: int, sweeps: int) -> None:
    machine, whole = Machine(bits, chains), step(batch, bits, chains, sweeps)
    gibbs = BlockGibbs(machine.left, machine.right)
    parameters = Boltzmann(machine.weight, machine.bias, machine.bias)
    multiply, draw = products(whole), random_bits(bits, chains, sweeps)
    candidates = {
        OURS: whole,
        NETWORK: step(batch, bits, 1, 1),
        SWEEPS: torch.no_grad()(lambda: gibbs.sweep(parameters, sweeps)),
        STEP_FLOOR: lambda: (multiply(), draw()),
        PRODUCTS: multiply,
    }
    case.add(compare(candidates, clock, rounds), references=(OURS, STEP_FLOOR))
    case.checks["steps per second"] = 1 / case.seconds[OURS]


def run(report: Report, peers: Peers, clock: Clock, rounds: int, sizes: str, memory_gb: float) -> None:
    makers = {OURS: ours, USUAL: usual, "uniforms below probabilities": thresholds, "NumPy": numpy, FLOOR: floor}
    for units, chains in SIZES[sizes]:
        case = Case({"units of a side": units, "chains": chains})
        if not report.wants(case):
            continue
        machine = Machine(units, chains)
        case.add(
            compare({n: make(machine) for n, make in makers.items()}, clock, rounds), references=(OURS, USUAL, FLOOR)
        )
        report.add(case)
    batch, bits, chains, sweeps = STEP_SIZES[sizes]
    case = Case({"step of": "DVAE++ 2~", "images": batch, "bits": 2 * bits, "chains": chains, "sweeps": sweeps})
    if report.wants(case):
        run_step(case, clock, rounds, batch, bits, chains, sweeps)
        report.add(case)
