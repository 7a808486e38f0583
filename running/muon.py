"""Muon (ours, `--optimizer muon`): the momentum of a matrix is made orthogonal before it is added.

Jordan et al. 2024; scaled to the size of an AdamW step as in Liu et al. 2025. torch.optim.Muon is
the same but rounds to bfloat16, for which a CPU without bfloat16 arithmetic takes eighty times as
long. Here that is done with CUDA only.
"""

import torch


class Muon(torch.optim.Optimizer):
    """For matrices. Where `found_inf` (a tensor, 0 or 1) is 1 a step changes nothing at all."""

    def __init__(self, params, lr, weight_decay=0.1, momentum=0.95):
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, momentum=momentum))
        self.found_inf = None

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.update(p, group)

    def update(self, p, group):
        state, lr, momentum = self.state[p], group["lr"], group["momentum"]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(p)
        sound, gradient = 1.0, p.grad
        if self.found_inf is not None:
            sound, gradient = 1 - self.found_inf, p.grad.nan_to_num(0, 0, 0)
        kept = state["momentum_buffer"]
        kept.add_((gradient - kept) * (1 - momentum) * sound)
        update = orthogonal(gradient.lerp(kept, momentum))  # Nesterov's
        p.mul_(1 - lr * group["weight_decay"] * sound)
        p.sub_(update * (lr * 0.2 * max(p.shape) ** 0.5 * sound))


def orthogonal(matrix, steps=5):
    """A matrix of the same singular vectors, whose singular values are all near 1.

    Five steps of Newton and Schulz with a quintic polynomial.
    """
    x = matrix.bfloat16() if matrix.is_cuda else matrix
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(steps):
        square = x @ x.T
        x = 3.4445 * x + (-4.775 * square + 2.0315 * square @ square) @ x
    return (x.T if tall else x).to(matrix.dtype)
