"""No file in between: weights come from a model in memory and go straight into another one."""

import open_clip

import clipmerge as cm

base = cm.load("clipmerge-demo/base.safetensors")
finetuned = cm.load("clipmerge-demo/ft/ft2.safetensors")
model = cm.build_model(cm.resolve_model(None, base))

cm.interpolate(base, finetuned, 0.5).load_into(model)
print(
    f"logit scale {model.logit_scale.exp().item():.3f} in {type(model).__name__} of open_clip {open_clip.__version__}"
)

# An own training loop would change the model here; then its weights are a point like any other.
here = cm.from_state_dict(model.state_dict(), name="here")
halfway = cm.mean([base, here])
print(f"{halfway!r}: {len(halfway.state_dict())} tensors")
