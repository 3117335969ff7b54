"""A layer-normalized LSTM in torch's own training loop: its tensors, an optimizer of torch, and `backward()`.

The task: name the class of a noisy sine by its frequency. Run `python docs/examples/torch_training.py`.
"""

from __future__ import annotations

import torch

import portnorm as pn


def batch(size: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Sequences (20, size, 1) and which of three frequencies each has."""
    labels = torch.randint(0, 3, (size,), generator=generator)
    time = torch.arange(20.0)[:, None]
    waves = torch.sin(time * (labels + 1) * 0.3) + 0.1 * torch.randn(20, size, generator=generator)
    return waves[:, :, None], labels


def main(updates: int = 60) -> list[float]:
    """The loss of every update."""
    generator = torch.Generator().manual_seed(0)
    lstm = pn.LSTM(1, 16, norm="layer", return_sequences=False, xp=torch, rng=0)
    model = pn.Sequential(lstm, pn.Linear(16, 3, xp=torch, rng=0))
    parameters = [p.requires_grad_() for p in model.parameters().values()]
    optimizer = torch.optim.Adam(parameters, lr=0.02)
    losses = []
    for _ in range(updates):
        x, labels = batch(32, generator)
        logits, _ = model(x, training=True)
        loss = torch.nn.functional.cross_entropy(logits, labels)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses


if __name__ == "__main__":
    losses = main()
    print(f"cross-entropy {losses[0]:.3f} at first, {losses[-1]:.3f} after {len(losses)} updates")
