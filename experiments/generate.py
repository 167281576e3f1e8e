"""Writes on from a text with a model that pretrain.py has trained."""

import dataclasses
import tempfile
from pathlib import Path

import jax
import optax
import tyro

from jaxlm import checkpoint, data, generate, models, train


@dataclasses.dataclass(frozen=True)
class Config:
    run: str = "runs/pretrain"
    """The folder of the run; the newest of its checkpoints is used."""
    prompt: str = "def "
    length: int = 250
    """Tokens to add, at most; text longer than the rows that the model learnt from gets worse."""
    temperature: float = 0.8
    """0 takes the likeliest token always."""
    seed: int = 0
    smoke: bool = False
    """Only show that everything works, with a tiny model that has learnt nothing."""


def main(config: Config) -> None:
    folder = untrained_model() if config.smoke else Path(config.run) / "checkpoints"
    model, params, tokenizer = generate.load_model(folder)
    text = generate.complete(
        model,
        params,
        tokenizer,
        config.prompt,
        length=config.length,
        temperature=config.temperature,
        seed=config.seed,
    )
    print(text)


def untrained_model() -> Path:
    folder = Path(tempfile.mkdtemp())
    model = models.TransformerConfig(vocab=data.ByteTokenizer.vocab, layers=1, width=16, heads=2)
    init, _ = models.transformer(model)
    about = {"model": dataclasses.asdict(model), "tokenizer": data.ByteTokenizer.name}
    with checkpoint.Checkpoints(folder, about) as checkpoints:
        checkpoints.save(train.start(init(jax.random.key(0)), optax.identity()))
    return folder


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
