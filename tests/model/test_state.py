"""State is a value: copied, forked, cut from the graph, moved, written and read, and refused when it is another's."""

import json
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from glade.errors import CheckpointError
from glade.model import LanguageModel, State
from glade.model.state import read_state_file

Build = Callable[..., LanguageModel]
MakeIds = Callable[..., Tensor]


def tensors(state: State) -> list[Tensor]:
    return [state.position, *(x for layer in state.layers for x in layer)]


def read(model: LanguageModel, ids: Tensor) -> State:
    with torch.no_grad():
        return model(ids)[1]


def test_copies_do_not_share(case: str, build: Build, make_ids: MakeIds) -> None:
    """Decoding writes into its state; what was cloned or selected from it stays what it was."""
    model, ids = build(case), make_ids(2, 9)
    state = read(model, ids)
    copies = [state.clone(), state.select([0, 1]), state.select(torch.tensor([True, True]))]
    before = [x.clone() for x in tensors(state)]
    model.step_(ids[:, 0], state)
    for copy in copies:
        assert all(torch.equal(x, y) for x, y in zip(tensors(copy), before, strict=True))
    assert state.position.tolist() == [10, 10]


def test_a_row_can_be_forked(case: str, build: Build, make_ids: MakeIds) -> None:
    model, ids = build(case, torch.float64), make_ids(3, 9)
    forks = read(model, ids).select([2, 0, 2])
    assert len(forks) == 3
    more = make_ids(1, 1).expand(3, 1)
    logits = model.step_(more[:, 0], forks)
    torch.testing.assert_close(logits[0], logits[2], rtol=0, atol=1e-12)
    with torch.no_grad():
        whole, _ = model(torch.cat([ids[[2, 0]], more[:2]], 1), logits="last")
    torch.testing.assert_close(logits[:2], whole, rtol=0, atol=1e-10)


def test_detach_cuts_the_graph(build: Build, make_ids: MakeIds) -> None:
    model, ids = build("hybrid"), make_ids(1, 9)
    _, state = model(ids)
    assert any(x.requires_grad for x in tensors(state))
    assert not any(x.requires_grad for x in tensors(state.detach()))


def test_a_file_gives_the_same_bits_back(case: str, build: Build, make_ids: MakeIds, tmp_path: Path) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        model = build(case).to(dtype)
        state = read(model, make_ids(2, 9))
        state.save(tmp_path / "state")
        for back in (State.load(tmp_path / "state"), State.load(tmp_path / "state", model)):
            assert [type(layer) for layer in back.layers] == [type(layer) for layer in state.layers]
            for x, y in zip(tensors(back), tensors(state), strict=True):
                assert x.dtype == y.dtype and torch.equal(x, y)


def test_a_saved_state_goes_on_where_it_was(build: Build, make_ids: MakeIds, tmp_path: Path) -> None:
    model, ids = build("hybrid", torch.float64), make_ids(2, 12)
    read(model, ids[:, :7]).save(tmp_path / "state")
    with torch.no_grad():
        expected = model(ids)[0][:, 7:]
        logits, _ = model(ids[:, 7:], State.load(tmp_path / "state", model))
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-10)


def test_no_row_is_a_state_too(build: Build, tmp_path: Path) -> None:
    model = build("hybrid")
    empty = read(model, torch.zeros(2, 3, dtype=torch.int64)).select([])
    assert len(empty) == 0
    empty.save(tmp_path / "state")
    assert len(State.load(tmp_path / "state", model)) == 0


def test_files_that_cannot_be_used_are_refused(build: Build, make_ids: MakeIds, tmp_path: Path) -> None:
    model, path = build("gdn2"), tmp_path / "state"
    with pytest.raises(CheckpointError, match="there is no state file"):
        State.load(path)
    read(model, make_ids(2, 9)).save(path)
    whole = path.read_bytes()
    for length in (0, 4, 100, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match="not a whole safetensors file"):
            State.load(path)
    path.write_bytes(whole)
    for other in ("kda", "hybrid", "rnn", "gdn2 gva", "delta no conv"):
        if other != "kda":  # a KDA of the same heads has a state of the same shapes
            with pytest.raises(CheckpointError, match="it is of another model"):
                State.load(path, build(other))


def test_contents_that_are_not_a_state_are_refused(build: Build, make_ids: MakeIds, tmp_path: Path) -> None:
    path = tmp_path / "state"
    read(build("gdn2"), make_ids(2, 9)).save(path)
    content = load_file(path)
    good = {"model_type": "glade_state", "format_version": "1", "kinds": json.dumps(["LinearState"] * 2)}
    for metadata, message in (
        ({}, "not a state that State.save wrote"),
        (good | {"format_version": "2"}, "state format 2; this version of glade reads 1"),
        (good | {"kinds": "["}, "not a whole state"),
        (good | {"kinds": json.dumps(["Other"] * 2)}, "lacks 'Other'"),
        (good | {"kinds": json.dumps(["LinearState"] * 3)}, "lacks 'layers.2.recurrent'"),
    ):
        save_file(content, path, metadata)
        with pytest.raises(CheckpointError, match=message):
            State.load(path)


def test_a_file_knows_its_model_and_its_tokens(build: Build, make_ids: MakeIds, tmp_path: Path) -> None:
    model, ids, path = build("hybrid"), make_ids(1, 9), tmp_path / "state"
    read(model, ids).save(path, model=model, tokens=ids[0].tolist(), notes={"who": "me"})
    assert read_state_file(path)[1:] == (ids[0].tolist(), {"who": "me"})
    state, tokens, _ = read_state_file(path, model)
    assert (tokens, state.position.tolist()) == (ids[0].tolist(), [9])
    # the same weights in another precision take it, in their dtypes
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        other = deepcopy(model).to(dtype)
        back = State.load(path, other)
        for x, y in zip(tensors(back), tensors(other.init_state(1)), strict=True):
            assert x.dtype == y.dtype
        other.step_(ids[:, 0], back)
    # a model of the same shapes does not, whether trained a little further or of another kind
    trained = deepcopy(model)
    with torch.no_grad():
        trained.embed.weight.mul_(1.02)
    with pytest.raises(CheckpointError, match="other weights"):
        State.load(path, trained)
    read(build("gdn2"), ids).save(path, model=build("gdn2"))
    with pytest.raises(CheckpointError, match="another config"):
        State.load(path, build("kda"))
    with pytest.raises(ValueError, match=r"3 tokens for rows that have read \[9\]"):
        read(model, ids).save(path, tokens=[1, 2, 3])


def test_a_file_of_a_recurrent_model_does_not_grow(build: Build, make_ids: MakeIds, tmp_path: Path) -> None:
    model, sizes = build("gdn2"), []
    for length in (10, 200):
        read(model, make_ids(1, length)).save(tmp_path / "state", model=model)
        sizes.append((tmp_path / "state").stat().st_size)
    assert sizes[0] == sizes[1]
