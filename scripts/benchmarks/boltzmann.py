"""Block Gibbs sampling of a restricted Boltzmann machine: a sweep draws all units of both sides once."""

from collections.abc import Callable

import numpy as np
import torch

from benchmarks.measure import Clock, compare
from benchmarks.peers import Peers
from benchmarks.report import Case, Report
from prior.boltzmann_samplers import BlockGibbs, Boltzmann

SIZES = {"quick": [(4, 8)], "full": [(200, 1000)]}  # units of a side, chains
OURS, USUAL, FLOOR = "tessera", "sigmoid and torch.bernoulli", "floor: two addmm"


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


def run(report: Report, peers: Peers, clock: Clock, rounds: int, sizes: str, memory_gb: float) -> None:
    makers = {OURS: ours, USUAL: usual, "uniforms below probabilities": thresholds, "NumPy": numpy, FLOOR: floor}
    for units, chains in SIZES[sizes]:
        machine = Machine(units, chains)
        case = Case({"units of a side": units, "chains": chains})
        case.add(compare({n: make(machine) for n, make in makers.items()}, clock, rounds), references=(USUAL, FLOOR))
        report.add(case)
