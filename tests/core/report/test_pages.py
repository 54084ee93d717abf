"""The pages of a record: numbers in the text, positions of painted blocks, and errors."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from lightforcing.lightforcing_core.report.pages import block_share, describe, pages
from lightforcing.lightforcing_core.rollout.record import ChunkRecord, RunRecord


def chunk_of(index, *, dense=None, block_map=None, layer_density=(0.25, 0.5), visible=None, seconds=None):
    frames = visible or tuple(range(2 * index + 2))
    return ChunkRecord(
        index=index,
        start_frame=2 * index,
        frames=2,
        visible=frames,
        window=len(frames),
        sparsity=0.0 if dense else 0.6,
        layer_density=(1.0, 1.0) if dense else layer_density,
        steps=4,
        seconds=seconds or {"denoise": 2.0, "clean pass": 0.5},
        why_dense=dense,
        query_blocks=8,
        key_block=16,
        block_map=block_map,
    )


def record_of(*chunks, **changes):
    record = RunRecord(
        chunks=chunks,
        batch=1,
        layers=2,
        heads=3,
        grid=(4, 8),  # 32 tokens: the first block covers the upper half, the second the lower one
        attention=("triton (triton is the fastest backend here and can run)",),
        notes=("the hard prompt switch at chunk 1 read 2 frames again",),
        seconds={"denoise": 4.0, "clean pass": 1.0},
        facts={"model": "Light Forcing short"},
    )
    return replace(record, **changes)


@pytest.fixture
def record():
    block_map = torch.zeros(2, 3, 4, 2, dtype=torch.int16)
    block_map[1, 2, 3, 1] = 8  # layer 1, head 2, frame 3: every query block reads the lower half
    block_map[0, :, 0, 0] = 4
    return record_of(chunk_of(0, dense="it has no past frames"), chunk_of(1, block_map=block_map))


def test_the_text_has_the_run_every_chunk_and_the_reasons_for_dense_attention(record):
    lines = describe(record).splitlines()
    assert lines[0] == "model: Light Forcing short"
    # Pairs: 2·2 dense and 2·4 at 37.5 %; dense 4 + 8.
    assert lines[1] == "2 chunks, 58% of dense attention FLOPs"
    assert lines[4].split() == ["0", "0-1", "2", "0.0%", "100.0%", "4", "denoise", "2.00,", "clean", "pass", "0.50"]
    assert lines[5].split()[:6] == ["1", "2-3", "4", "60.0%", "37.5%", "4"]
    assert "    0  100.0% 25.0%" in lines
    assert "    1  100.0% 50.0%" in lines
    assert "seconds: denoise 4.0, clean pass 1.0" in lines
    assert lines[-3:] == [
        "attention: triton (triton is the fastest backend here and can run)",
        "dense: chunk 0: it has no past frames",
        "dense: the hard prompt switch at chunk 1 read 2 frames again",
    ]


def test_a_policy_that_decides_itself_has_no_scheduled_share():
    block_map = torch.tensor([[8, 0], [4, 0]])[None, :, None].expand(1, 2, 4, 2)
    own = replace(chunk_of(1, block_map=block_map), sparsity=None)
    record = record_of(chunk_of(0, dense="it has no past frames"), own, heads=2)
    assert describe(record).splitlines()[5].split()[3:5] == ["–", "37.5%"]
    assert "heads of chunk 1 read between 25.0% (layer 0, head 1) and 50.0% (layer 0, head 0)" in describe(record)

    def dashes(record):
        page = np.asarray(pages(record)[0]).astype(int)
        return (np.abs(page - (0xD1, 0x49, 0x5B)).sum(-1) < 6).sum()

    assert dashes(record) == 0 < dashes(record_of(chunk_of(0), chunk_of(1)))


def test_equal_layers_take_one_line_and_equal_reasons_are_listed_once():
    chunks = [chunk_of(index, layer_density=(0.25, 0.25)) for index in range(2)]
    chunks += [chunk_of(index, dense="its scheduled sparsity is 0") for index in (2, 3, 5)]
    text = describe(record_of(*chunks, attention=()))
    assert "all 2 layers read the same share" in text
    assert "attention: dense in every call" in text
    assert "dense: chunk 2-3, 5: its scheduled sparsity is 0" in text


def test_shares_are_of_one_layer_and_head_or_the_mean_of_all(record):
    chunk = record.chunks[1]
    one = block_share(chunk, 1, 2)
    assert one.shape == (4, 2)
    assert one.nonzero().tolist() == [[3, 1]]
    assert one[3, 1] == 1.0
    assert block_share(chunk, None, None)[3, 1] == pytest.approx(1 / 6)
    assert block_share(chunk, 0, None)[0].tolist() == [0.5, 0.0]
    assert block_share(chunk, None, 0)[0].tolist() == [0.25, 0.0]
    assert (block_share(record.chunks[0], None, None) == 1).all()
    assert block_share(replace(chunk, block_map=None), None, None) is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"chunk": 2}, "chunk 2 is not in the record; it holds chunks 0 to 1"),
        ({"layer": 2}, "there is no layer 2; the model has 2, so use 0 to 1"),
        ({"head": 3}, "there is no head 3; the model has 3, so use 0 to 2"),
    ],
)
def test_missing_chunks_layers_and_heads_are_refused_with_the_existing_ones(record, options, message):
    with pytest.raises(ValueError, match=message):
        pages(record, **options)


def test_only_dense_layers_are_grey_on_the_density_page():
    def grey(*chunks):
        page = np.asarray(pages(record_of(*chunks))[0]).astype(int)
        return (np.abs(page - (0xD5, 0xDB, 0xE3)).sum(-1) < 6)[230:460, 70:440].mean()

    assert grey(chunk_of(0), chunk_of(1, layer_density=(0.25, 0.6))) < 0.01
    assert grey(chunk_of(0), chunk_of(1, layer_density=(1.0, 0.6))) == pytest.approx(0.25, abs=0.02)
    assert grey(chunk_of(0, dense="it has no past frames"), chunk_of(1)) == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("tiles", [False, True])
def test_the_map_paints_a_read_block_at_its_frame_and_position(record, tiles):
    """Four frames in two rows of two; the read block is the lower half of the last, of 4 by 4 tokens its right half."""
    record = replace(record, chunks=(record.chunks[0], replace(record.chunks[1], tiles=tiles)))
    page = np.asarray(pages(record, layer=1, head=2)[2]).astype(int)
    heat = page[: 512 - 110]  # above the colour bar
    rows, columns = np.nonzero((heat[..., 0] > 230) & (heat[..., 1] > 230) & (heat[..., 2] < 190))
    height, width = np.ptp(rows), np.ptp(columns)
    if tiles:
        assert columns.min() > 256 + 90
        assert 100 < width < 140
        assert height > 100
        return
    frame_rows, frame_columns = np.nonzero(heat.sum(-1) < 60)
    assert columns.min() > 256 - 10, "the last frame is the right one"
    assert width > 200
    assert 50 < height < 70, "half a frame of about 120"
    assert frame_columns.min() < 20
    assert rows.min() > frame_rows[frame_columns > 266].max() - 3, "below the dark upper half, nothing dark below"


def test_given_frames_are_visible_in_the_map(record):
    frames = torch.zeros(13, 16, 32, 3)
    frames[12, :, :16] = 1.0  # latent frame 3 ends with video frame 12
    plain, with_frames = (np.asarray(pages(record, given, layer=1, head=2)[2]).astype(int) for given in (None, frames))
    lighter = (with_frames - plain).sum(-1) > 150
    rows, columns = np.nonzero(lighter)
    assert len(rows) > 2000
    assert columns.min() > 246
    assert columns.max() < 256 + 130, "only the left half of the last frame is white"
    short = pages(record, frames[:5], layer=1, head=2)[2]
    assert short.size == (512, 512)
    wide = chunk_of(59, visible=tuple(range(120)), block_map=torch.ones(2, 3, 120, 2, dtype=torch.int16))
    assert pages(record_of(chunk_of(58), wide))[2].size == (512, 512)


def test_a_run_without_a_finished_chunk_has_a_text():
    record = record_of(seconds={}, notes=())
    assert "no finished chunk" in describe(record)
    with pytest.raises(ValueError, match="it holds chunks none"):
        pages(record)


@pytest.mark.parametrize("count", [1, 40])
def test_three_pages_of_512_with_any_number_of_reasons(count):
    made = pages(record_of(*(chunk_of(index, dense=f"reason {index}") for index in range(count))))
    assert [(page.mode, page.size) for page in made] == [("RGB", (512, 512))] * 3
    assert all(np.asarray(page).std() > 10 for page in made)
