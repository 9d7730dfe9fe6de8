"""`tunesmith push`: what a run made, on the hub."""

from __future__ import annotations

from typing import Annotated

import typer

from tunesmith.cli.options import Json


def push(
    run: Annotated[str, typer.Argument(help="The run folder.", metavar="RUN")],
    repo: Annotated[str, typer.Option("--repo", help="Repository on the hub.", metavar="ORG/NAME")],
    what: Annotated[
        str,
        typer.Option(
            "--what", help="adapter, merged (RUN/merged), a model's folder, or a .gguf file.", metavar="NAME|PATH"
        ),
    ] = "adapter",
    public: Annotated[
        bool, typer.Option("--public", help="Make it public, or write to a public one (default: private).")
    ] = False,
    revision: Annotated[
        str | None, typer.Option("--revision", help="Branch (default: main); made if missing.", metavar="NAME")
    ] = None,
    license: Annotated[
        str | None, typer.Option("--license", help="For the card: apache-2.0, mit, other, ...", metavar="ID")
    ] = None,
    base_model: Annotated[
        str | None, typer.Option("--base-model", help="The base's hub id, if it was a folder.", metavar="ORG/NAME")
    ] = None,
    replace: Annotated[
        bool, typer.Option("--replace", help="Delete other weights in the repository, in the same commit.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Upload an adapter, model or GGUF file with a model card. The token is HF_TOKEN, or `hf auth login`'s."""
    from tunesmith.cli.console import Console
    from tunesmith.workflows.push import push as push_run

    with Console() as console:
        result = push_run(
            run,
            repo,
            what=what,
            public=public,
            revision=revision,
            license=license,
            base_model=base_model,
            replace=replace,
            progress=console.progress,
        )
    if as_json:
        console.result(result)
        return
    size = sum(file["size"] for file in result["files"]) / 2**20
    print(
        f"{result['url']} ({'private' if result['private'] else 'public'}, {result['revision']}, commit "
        f"{result['commit'][:12]}): {len(result['files'])} files ({size:.1f} MB) and the model card; the hub lists them with "
        "the sizes and hashes that were sent"
    )
    if result["left_out"]:
        print(f"left out: {', '.join(result['left_out'])}")
    if result["deleted"]:
        print(f"deleted there, weights that were not in this push: {', '.join(result['deleted'])}")
    if result["also_there"]:
        print(f"there already, unchanged: {', '.join(result['also_there'])}")
    if result["base_model"] is None:
        print("the card has no hub id of the base, which was read from a folder: --base-model ORG/NAME gives it")
