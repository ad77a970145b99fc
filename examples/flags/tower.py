"""The vision tower learns flags: at its eight image tokens it gives the embeddings of the country's name, in tokens.

So the language model gets the vectors of words that it knows: "Peru.......", a name and full stops.
The loss of a picture's features f (8, d), with the names' embeddings t_c (8, d) for countries c,

    |f - t_c|² / |t|²  +  cross-entropy of c in softmax over c' of -|f - t_c'|² / (τ |t|²)

takes both its nearness and which name is nearest. Flags that no country has are shown too, and each belongs to no name:
their features are drawn to the mean of all names. So recall is sharp for flags that were learned, and nothing in
particular for others.
"""

from __future__ import annotations

import random
from typing import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from examples.flags.countries import Country, countries
from examples.flags.pictures import HEIGHT, WIDTH, flag, of_no_country, shots, thumbnails, to_bytes
from mmsr.chat import Chat
from mmsr.model import VLModel
from mmsr.system.errors import UserError
from mmsr.vision import QWEN2_5_VL, VisionConfig, to_image

TOKENS = HEIGHT * WIDTH // QWEN2_5_VL.side**2  # of a picture
KNOWN, MADE_UP = 36, 12  # flags of a batch
RATE = 1.5e-3
SHARPNESS = 0.05  # τ


def sizes(hidden_size: int) -> VisionConfig:
    """A tower of three blocks for a language model of this width."""
    return VisionConfig(
        depth=3,
        hidden_size=128,
        intermediate_size=384,
        num_heads=4,
        out_hidden_size=hidden_size,
        fullatt_block_indexes=(0, 1, 2),
    )


def name_embeddings(model: VLModel, chat: Chat, known: Sequence[Country]) -> Tensor:
    """(countries, 8, d): what would stand in a picture's place if the name were written there.

    Raises UserError for a name with more tokens than a picture.
    """
    stop = chat.opening(".")
    rows = []
    for country in known:
        ids = chat.opening(f" {country.name}")
        if len(ids) > TOKENS:
            raise UserError(f"{country.name} has {len(ids)} tokens, a picture {TOKENS}: take another --llama")
        rows.append(ids + (TOKENS - len(ids)) * stop)
    embedding = model.model.embed_tokens.weight  # (V, d)
    return embedding[torch.tensor(rows, device=embedding.device)].detach().float()


def train(
    model: VLModel,
    chat: Chat,
    known: Sequence[Country],
    steps: int,
    seed: int,
    on_step: Callable[[float], None],
) -> None:
    """Train the tower of a model in fp32. Its language model stays as it is."""
    targets = name_embeddings(model, chat, known)  # (C, 8, d)
    scale = targets.square().sum((1, 2)).mean()  # |t|²
    tower = model.visual
    optimizer = torch.optim.AdamW(tower.parameters(), lr=RATE, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps, pct_start=0.1)
    rng = random.Random(f"tower {seed}")
    flags = [flag(country) for country in known]
    real = thumbnails([flag(country) for country in countries()])
    for _ in range(steps):
        chosen = [rng.randrange(len(known)) for _ in range(KNOWN)]
        pictures = [flags[i] for i in chosen] + [of_no_country(rng, real) for _ in range(MADE_UP)]
        features = encode(tower, shots(pictures, seed=rng.randrange(2**40)))  # (48, 8, d)
        loss = flag_loss(features, targets, torch.tensor(chosen, device=targets.device), scale)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(tower.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        on_step(float(loss.detach()))


def flag_loss(features: Tensor, targets: Tensor, chosen: Tensor, scale: Tensor) -> Tensor:
    """The mean loss of features (S, 8, d): the first belong to the countries `chosen`, the rest to none."""
    known, others = features[: len(chosen)], features[len(chosen) :]
    distances = squared_distances(known, targets) / scale  # (K, C)
    nearness = distances.gather(1, chosen[:, None]).mean()
    which = F.cross_entropy(-distances / SHARPNESS, chosen)
    nothing = (others - targets.mean(0)).square().sum((1, 2)).mean() / scale
    return nearness + which + nothing


def squared_distances(features: Tensor, targets: Tensor) -> Tensor:
    """|f - t|² of features (S, 8, d) and targets (C, 8, d): (S, C)."""
    return torch.cdist(features.flatten(1), targets.flatten(1)).square()


def encode(tower, pictures: Tensor) -> Tensor:
    """Features (S, 8, d) of shots (S, 3, H, W)."""
    images = [to_image(np.ascontiguousarray(to_bytes(shot)), "") for shot in pictures]
    return tower(images).unflatten(0, (len(images), TOKENS))


@torch.inference_mode()
def recognised(model: VLModel, chat: Chat, known: Sequence[Country], seed: int) -> float:
    """The share of fresh shots, one of each of these countries, whose features are nearest to its name."""
    targets = name_embeddings(model, chat, known)
    features = encode(model.visual, shots([flag(country) for country in known], seed))
    nearest = squared_distances(features, targets).argmin(1)
    return float((nearest.cpu() == torch.arange(len(known))).float().mean())
