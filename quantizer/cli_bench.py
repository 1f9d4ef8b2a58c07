"""`qgraft bench`: the benchmark of layers."""

import typer


def bench(context: typer.Context) -> None:
    """Time every layer against F.linear on this machine.

    \b
    Example: qgraft bench --scheme w8a16 --shape 4096x4096 --tokens 1,16
    """
    from ..benchmarks import run

    raise typer.Exit(run.main(context.args))
