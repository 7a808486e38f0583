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
            by_shape = {}
            for p in group["params"]:
                if p.grad is not None:
                    by_shape.setdefault(p.shape, []).append(p)
            for matrices in by_shape.values():
                self.update(matrices, group)

    def update(self, matrices, group):
        """A step of matrices of one shape, which are made orthogonal together."""
        lr, momentum, sound, directions = group["lr"], group["momentum"], 1.0, []
        if self.found_inf is not None:
            sound = 1 - self.found_inf
        for p in matrices:
            state, gradient = self.state[p], p.grad
            if not state:
                state["momentum_buffer"] = torch.zeros_like(p)
            if self.found_inf is not None:
                gradient = gradient.nan_to_num(0, 0, 0)
            kept = state["momentum_buffer"]
            kept.add_((gradient - kept) * (1 - momentum) * sound)
            directions.append(gradient.lerp(kept, momentum))  # Nesterov's
        scale = lr * 0.2 * max(matrices[0].shape) ** 0.5 * sound
        for p, update in zip(matrices, orthogonal(torch.stack(directions))):
            p.mul_(1 - lr * group["weight_decay"] * sound)
            p.sub_(update * scale)


def orthogonal(matrices, steps=5):
    """Matrices (n, rows, columns) of the same singular vectors, with singular values all near 1.

    Five steps of Newton and Schulz with a quintic polynomial.
    """
    x = matrices.bfloat16() if matrices.is_cuda else matrices
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        square = x @ x.mT
        factor = torch.baddbmm(square, square, square, beta=-4.775, alpha=2.0315)
        x = torch.baddbmm(x, factor, x, beta=3.4445)
    return (x.mT if tall else x).to(matrices.dtype)
