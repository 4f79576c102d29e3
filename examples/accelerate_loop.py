"""A training loop of one's own with Accelerate, its parameters defended: one line differs from the plain loop.

    accelerate launch examples/accelerate_loop.py --epsilon 0.1
    accelerate launch --config_file examples/accelerate_configs/two_cpus.yaml examples/accelerate_loop.py --cpu

It learns which of two halves of random numbers has the larger sum: no download, and seconds on a CPU.
"""

import argparse

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from hf_parcor import CorruptionConstraint, DefendedBackward, MultiStepRisk


def train(args: argparse.Namespace) -> float:
    """Train, and return the accuracy on data that was not seen."""
    accelerator = Accelerator(gradient_accumulation_steps=args.gradient_accumulation_steps, cpu=args.cpu)
    accelerator.print(f"processes: {accelerator.num_processes}")
    set_seed(args.seed)
    numbers = torch.randn(1536, 16)
    labels = (numbers[:, :8].sum(1) > numbers[:, 8:].sum(1)).long()
    loaders = [DataLoader(TensorDataset(numbers[part], labels[part]), 32) for part in (slice(1024), slice(1024, None))]
    model = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)
    model, optimizer, train_loader, test_loader = accelerator.prepare(model, optimizer, *loaders)

    defense = MultiStepRisk(CorruptionConstraint(p=2, epsilon=args.epsilon), steps=args.steps, start_epoch=1)
    backward = DefendedBackward(accelerator, defense, model)
    for epoch in range(args.epochs):
        for x, y in train_loader:
            with accelerator.accumulate(model):
                # The plain loop: accelerator.backward(nn.functional.cross_entropy(model(x), y))
                loss = backward(lambda xy: nn.functional.cross_entropy(model(xy[0]), xy[1]), (x, y), epoch=epoch)
                optimizer.step()
                optimizer.zero_grad()
        corrupted = f", at corrupted weights {loss.corrupted:.3f}" if loss.defended else ", not defended yet"
        accelerator.print(f"epoch {epoch}: loss {loss.clean:.3f}{corrupted}")
    right = [accelerator.gather_for_metrics(model(x).argmax(-1) == y) for x, y in test_loader]
    accuracy = float(torch.cat(right).float().mean())
    accelerator.print(f"accuracy {accuracy:.3f}")
    return accuracy


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epsilon", type=float, default=0.1, help="radius of the corruption")
    parser.add_argument("--steps", type=int, default=1, help="corruption steps K; a step takes K + 1 passes")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--lr", type=float, default=1e-2)
    parser.add_argument("--gradient_accumulation_steps", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cpu", action="store_true", help="stay on the CPU where there is a GPU")
    train(parser.parse_args())
