"""What a push does to a repository that is there: who can read it, which files go, which stay."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from hub_runs import NAME, record_merge, shard, train_on
from stub_hub import Repo, StubHub, write_gguf
from tunesmith.errors import UserError, VerificationError
from tunesmith.registry.records import adapter_hash
from tunesmith.workflows.push import push

# -- the repository ---------------------------------------------------------------------------------------------------


def test_a_public_repository_is_written_to_only_when_asked(run: Path, hub: StubHub) -> None:
    hub.repos[NAME] = Repo(private=False)
    with pytest.raises(UserError, match=r"me/bins: exists and is public: .* Pass --public to write to it"):
        push(run, NAME)
    assert hub.files(NAME) == {}
    assert [method for method, _ in hub.requests if method in ("POST", "PUT")] == []
    assert push(run, NAME, public=True)["private"] is False
    assert "adapter_model.safetensors" in hub.files(NAME)


def test_public_makes_a_new_repository_public_and_no_old_one(run: Path, hub: StubHub) -> None:
    assert push(run, "me/open", public=True)["private"] is False
    assert hub.repos["me/open"].private is False
    hub.repos[NAME] = Repo(private=True)
    with pytest.raises(UserError, match=r"exists and is private, and --public does not change that"):
        push(run, NAME, public=True)
    assert hub.files(NAME) == {}


def test_a_repository_that_came_out_public_gets_nothing(run: Path, hub: StubHub) -> None:
    hub.forced_private = False
    with pytest.raises(
        VerificationError, match=r"was to be made private, and the hub made it public .*nothing was uploaded"
    ):
        push(run, NAME)
    assert hub.files(NAME) == {}
    assert hub.count("POST", "preupload") == 0


def test_a_name_that_is_taken_unseen(run: Path, hub: StubHub) -> None:
    hub.repos[NAME] = Repo(private=True)
    hub.hidden.add(NAME)
    with pytest.raises(UserError, match=r"the name is taken, but the token cannot see it"):
        push(run, NAME)


def test_an_existing_private_repository_is_updated_and_keeps_its_files(run: Path, hub: StubHub) -> None:
    hub.repos[NAME] = Repo(private=True, branches={"main": {"old.bin": (b"x", False), ".gitattributes": (b"y", False)}})
    assert push(run, NAME)["also_there"] == ["old.bin"]
    assert hub.files(NAME)["old.bin"] == b"x"
    commits = hub.count("POST", "/commit/")
    again = push(run, NAME)  # nothing changed: no upload, no commit
    assert (hub.count("POST", "/commit/"), hub.count("PUT", "/lfs/")) == (commits, 1)
    assert again["also_there"] == ["old.bin"]


def test_shards_of_an_earlier_push_go_in_the_same_commit(run: Path, hub: StubHub) -> None:
    shard(run)
    push(run, NAME, what="merged")
    hub.repos[NAME].branches["main"] |= {"notes.txt": (b"mine", False), "sub/model.safetensors": (b"mine", True)}
    shutil.rmtree(run / "merged")
    merged = shard(run)
    whole = {"w": np.zeros(8, dtype=np.float32)}
    for path in merged.glob("model*"):
        path.unlink()
    save_file(whole, merged / "model.safetensors")
    record_merge(run, merged)
    commits = hub.count("POST", "/commit/")
    result = push(run, NAME, what="merged")
    gone = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"]
    assert result["deleted"] == gone
    assert result["also_there"] == ["notes.txt", "sub/model.safetensors"]
    assert hub.count("POST", "/commit/") == commits + 1
    assert sorted(hub.files(NAME)) == [
        "README.md",
        "config.json",
        "model.safetensors",
        "notes.txt",
        "sub/model.safetensors",
        "tunesmith.json",
    ]


@pytest.mark.parametrize(
    "name",
    [
        "model.safetensors",
        "model-00001-of-00003.safetensors",
        "model.safetensors.index.json",
        "pytorch_model.bin",
        "pytorch_model-00001-of-00002.bin",
        "pytorch_model.bin.index.json",
        "adapter_model.bin",
        "tf_model.h5",
        "other-q4_k_m.gguf",
    ],
)
def test_weights_that_others_put_there_are_refused_unless_replaced(run: Path, hub: StubHub, name: str) -> None:
    hub.repos[NAME] = Repo(private=True, branches={"main": {name: (b"old", True), "old.txt": (b"x", False)}})
    with pytest.raises(
        UserError, match=rf"me/bins: {name}: other weights, .*; nothing was uploaded\. .*or pass --replace"
    ):
        push(run, NAME)
    assert [method for method, _ in hub.requests if method in ("POST", "PUT")] == []
    result = push(run, NAME, replace=True)
    assert (result["deleted"], result["also_there"]) == ([name], ["old.txt"])
    assert name not in hub.files(NAME)


def test_weights_of_another_kind_are_refused_though_tunesmith_put_them_there(run: Path, hub: StubHub) -> None:
    push(run, NAME)
    shard(run)
    with pytest.raises(UserError, match=r"me/bins: adapter_config.json, adapter_model.safetensors: other weights"):
        push(run, NAME, what="merged")
    assert push(run, NAME, what="merged", replace=True)["deleted"] == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


def test_types_of_one_gguf_stand_side_by_side_and_those_of_earlier_weights_go(
    run: Path, hub: StubHub, tmp_path: Path
) -> None:
    own = adapter_hash(run / "adapter")
    push(run, NAME, what=str(write_gguf(tmp_path / "bins-q8_0.gguf", own)))
    hub.repos[NAME].branches["main"]["foreign-q2_k.gguf"] = (b"theirs", True)
    result = push(run, NAME, what=str(write_gguf(tmp_path / "bins-q4_k_m.gguf", own)))
    assert (result["deleted"], result["also_there"]) == ([], ["bins-q8_0.gguf", "foreign-q2_k.gguf"])
    train_on(run)
    new = write_gguf(tmp_path / "bins-q5_k_m.gguf", adapter_hash(run / "adapter"))
    result = push(run, NAME, what=str(new))
    assert (result["deleted"], result["also_there"]) == (["bins-q4_k_m.gguf", "bins-q8_0.gguf"], ["foreign-q2_k.gguf"])


def test_a_deletion_whose_answer_was_lost_is_not_made_twice(run: Path, hub: StubHub) -> None:
    hub.repos[NAME] = Repo(private=True, branches={"main": {"pytorch_model.bin": (b"old", True)}})
    left = [500]
    hub.after = lambda method, path: left.pop() if "/commit/" in path and left else None
    push(run, NAME, replace=True)
    assert left == []
    assert "pytorch_model.bin" not in hub.files(NAME)


def test_a_repository_that_others_change_meanwhile_is_looked_at_again(run: Path, hub: StubHub) -> None:
    hub.repos[NAME] = Repo(private=True)
    theirs = [{"pytorch_model.bin": (b"theirs", True)}]

    def meanwhile(method: str, path: str) -> None:
        if "/commit/" in path and theirs:
            hub.repos[NAME].branches["main"] |= theirs.pop()

    hub.fail = meanwhile
    with pytest.raises(UserError, match=r"me/bins: pytorch_model.bin: other weights"):
        push(run, NAME)
    assert list(hub.files(NAME)) == ["pytorch_model.bin"]


def test_a_revision_is_a_branch_of_its_own(run: Path, hub: StubHub) -> None:
    for _ in range(2):  # the second time it is there: 409
        push(run, NAME, revision="v2")
    assert hub.files(NAME) == {}
    assert "adapter_model.safetensors" in hub.files(NAME, "v2")
    assert f'snapshot_download("{NAME}", revision="v2")'.encode() in hub.files(NAME, "v2")["README.md"]
