"""`lightforcing queue`: run a workflow, or a batch of prompts, on one ComfyUI server and download the results."""
