"""Our ring of roped keys against the published long mode: un-roped keys, re-roped from 0 in every pass."""

import pytest

from ...support.unroped import assert_video_sees


@pytest.mark.parametrize(("window", "sinks", "per_chunk", "frames"), [(7, 1, 3, 15), (8, 2, 2, 14), (3, 1, 1, 6)])
def test_following_sinks_give_the_published_rollout(window, sinks, per_chunk, frames):
    def shown(past, length):
        """The sinks and the newest past frames that fit; positions count from the window's start."""
        recent = max(sinks, past + length - (window - sinks))
        return dict(enumerate([*range(min(sinks, past)), *range(recent, past)]))

    ring = {"window": window, "sink_frames": sinks, "sink_rope": "follow"}
    assert_video_sees(shown, frames, frames_per_chunk=per_chunk, **ring)
