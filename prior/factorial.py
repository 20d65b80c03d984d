"""Independent codes with learned probabilities: what knows how often each code occurs at each place, and no more."""

import torch
from torch import Tensor, nn

from prior.base import Codes, Prior, PriorConfig, Sampled
from prior.sampling import check_totals, draw, filter_logits, log_prob_of


class Factorial(Prior):
    """p(codes | label) = prod_i p(c_i | label): one table of logits for each code and class, all of it exact.

    The learned categorical prior of the Gumbel-softmax autoencoder (Jang et al. 2017, arXiv:1611.01144); over bits it
    is `Bernoulli` without the interface of a Boltzmann machine.

    Attributes:
        logits: per level, (max(num_classes, 1), N_l, K_l); 0 at first, which is the uniform distribution.
    Args:
        config: code space and number of classes.
    """

    sampling_options = frozenset(
        {"temperature", "top_k", "top_p", "min_p", "given", "codes_callback", "return_log_prob"}
    )

    def __init__(self, config: PriorConfig):
        super().__init__(config)
        sizes = zip(self.spec.lengths, self.spec.vocab_sizes)
        self.logits = nn.ParameterList(torch.zeros(max(config.num_classes, 1), n, k) for n, k in sizes)

    def log_probs(self, labels: Tensor | None = None) -> tuple[Tensor, ...]:
        """(B, N_l, K_l) per level, in nats, of every value of each code; B = 1 without labels."""
        tables = [table.float().log_softmax(dim=-1) for table in self.logits]
        return tuple(table if labels is None else table[labels] for table in tables)

    def log_prob(self, codes: Codes, labels: Tensor | None = None) -> Tensor:
        return self.spec.flatten(self.log_prob_by_code(codes, labels)).sum(dim=1)

    def log_prob_by_code(self, codes: Codes, labels: Tensor | None = None) -> tuple[Tensor, ...]:
        self.check_inputs(codes, labels)
        return tuple(
            table.expand(len(code), -1, -1).gather(2, code.flatten(1).unsqueeze(2)).view(code.shape)
            for table, code in zip(self.log_probs(labels), codes)
        )

    def _sample(self, *arguments) -> Codes:
        return self._sample_by_steps(*arguments, None).codes

    def _sample_by_steps(self, num_samples, labels, options, noise, given, callback, codes_callback) -> Sampled:
        codes, log_probs = [], []
        for table, shape in zip(self.log_probs(labels), self.spec.shapes):
            logits = filter_logits(table, options).expand(num_samples, -1, -1).flatten(0, 1)
            code, total = draw(logits, noise.uniform(*shape).flatten())
            check_totals([total])
            codes.append(code.view(num_samples, *shape))
            log_probs.append(log_prob_of(code, logits).view(num_samples, *shape))
        if given is not None:
            codes = [torch.where(known, fixed, code) for fixed, known, code in zip(*given, codes)]
            log_probs = [part.masked_fill(known, 0.0) for part, known in zip(log_probs, given[1])]
        callback(self.spec.length, self.spec.length)
        if codes_callback is not None:  # all of them come at once
            arrived = tuple(torch.ones_like(code, dtype=torch.bool) for code in codes)
            codes_callback(tuple(code.clone() for code in codes), arrived)
        return Sampled(tuple(codes), self.spec.flatten(log_probs).sum(dim=1))
