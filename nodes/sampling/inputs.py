"""The inputs that both sampling nodes have."""

from comfy_api.latest import io

from .request import KV_CACHES


def run_inputs() -> list[io.Input]:
    """The inputs at the end of both nodes."""
    return [
        io.Combo.Input("replay", options=["all", "window"], default="all", optional=True, advanced=True),
        io.Boolean.Input("keep_finished", default=True, optional=True, advanced=True),
        io.Combo.Input("kv_cache", options=list(KV_CACHES), default="auto", optional=True, advanced=True),
        io.Float.Input("context_noise", default=0.0, min=0.0, max=1000.0, step=1.0, optional=True, advanced=True),
        io.Latent.Input("end_latent", optional=True),
    ]
