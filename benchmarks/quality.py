"""How much a scheme loses, on the two real models: one line for each scheme that is named.

    python -m qgraft.benchmarks.quality w8a8 "{name: w4a16, group_size: 128}" --model lm --documents 16 --windows 4

A shipped recipe by its name, or a scheme with its options in braces, which leaves alone the layers that the shipped
recipes leave alone. With `--documents 0` there is no calibration data.
"""

import argparse
import copy
import sys
import time
from collections.abc import Sequence

import qgraft
from qgraft.recipes import Recipe, load_recipe

from . import models
from .subjects import LanguageModel, SentenceEncoder, Subject


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m qgraft.benchmarks.quality", description=__doc__.split("\n")[0])
    parser.add_argument("recipe", nargs="+", help="a shipped recipe, or '{name: SCHEME, option: value, ...}'")
    parser.add_argument("--model", choices=["lm", "encoder"], help="one of the two; default both")
    parser.add_argument("--documents", type=int, default=32, help="of calibration; 0: none")
    parser.add_argument("--windows", type=int, default=8, help="of 512 tokens that perplexity is measured on")
    args = parser.parse_args(argv)
    recipes = {text: _recipe(text) for text in args.recipe}
    try:
        models.require()
    except models.MissingModels as error:
        print(error, file=sys.stderr)
        return 2
    for subject in _subjects(args):
        print(f"{subject.name}: {subject.setting.split('. ')[0]}.")
        _say(subject, "float32", subject.quality(subject.model), 0)
        for text, recipe in recipes.items():
            start = time.perf_counter()
            data = subject.calibration if args.documents else None
            model = qgraft.Quantizer(copy.deepcopy(subject.model)).quantize(recipe, calibration=data)
            seconds = time.perf_counter() - start
            _say(subject, text, subject.quality(model), seconds)
    return 0


def _say(subject: Subject, name: str, quality: float, seconds: float) -> None:
    print(f"  {subject.quality_format.format(quality):>9} {subject.quality_name}  {seconds:5.0f} s  {name}", flush=True)


def _recipe(text: str) -> Recipe:
    if not text.startswith("{"):
        return load_recipe(text)
    # The list of layers to leave alone is that of the shipped recipe.
    return Recipe.from_yaml(f"extends: w4a4_svd\nscheme: {text}\n", source="command line")


def _subjects(args: argparse.Namespace) -> list[Subject]:
    calibration, evaluation = models.news(models.CALIBRATION)[: args.documents], models.news(models.EVALUATION)
    chosen: list[Subject] = []
    if args.model != "encoder":
        chosen.append(LanguageModel(*models.smollm2(), calibration, evaluation, windows=args.windows))
    if args.model != "lm":
        chosen.append(SentenceEncoder(*models.minilm(), calibration, evaluation, sentences=64))
    return chosen


if __name__ == "__main__":
    sys.exit(main())
