"""The model card of an exported timm folder."""

import json
from collections.abc import Mapping
from typing import Any

from tlcli.runs.load import LoadedRun
from tlcli.runs.run_dir import RunDir, read_json
from tlcli.specs import Fit

FIT_WORDS = {
    "crop": "the middle square is cut out and resized",
    "squash": "both sides are resized",
    "pad": "the longer side is resized and the rest is filled with black",
}


BORDERS = (
    "timm's transform fills the borders with the mean colour, not with black as the run did: "
    "prepare the images yourself where that matters."
)


def model_card(run: LoadedRun, facts: Mapping[str, Any], architecture: str) -> str:
    """Markdown with the front matter that model hubs read: what the model tells apart, how well, and how to use it."""
    own = run.preprocessing
    names = json.dumps(list(run.classes), ensure_ascii=False, indent=2)  # a line each, none of which ends the block
    return f"""\
---
library_name: timm
pipeline_tag: image-classification
tags:
- image-classification
- timm
- tlcli
---

# {architecture}, {len(run.classes)} classes

An image classifier, fine-tuned with tlcli {facts["tlcli"]} from the backbone {run.classifier.name}.

{_result(run)}

## Use

```python
import timm

model = timm.create_model("local-dir:FOLDER", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
```

Input: RGB, {own.size} x {own.size} pixels ({FIT_WORDS[own.fit.value]}, bilinear), divided by 255, less the mean
{list(own.mean)}, divided by {list(own.std)}. Output: a logit for each class, in this order:

```json
{names}
```

{_border(run)}Divide logits by the temperature {run.temperature:.6g} before the softmax for calibrated probabilities.
"""


def _result(run: LoadedRun) -> str:
    """The sentence with the test accuracy, where these weights were tested."""
    if run.checkpoint != "best":
        return "These are the weights of the last epoch; those of the best one were tested."
    try:
        test = read_json(RunDir(run.path).test_file)
        low, high = test["accuracy_ci95"]
        return (
            f"Test accuracy {test['accuracy']:.4f}, 95 % interval {low:.4f} to {high:.4f}, on {test['n']:,} images "
            f"that it was not trained on."
        )
    except (OSError, KeyError, TypeError, ValueError):
        return "It was not tested."


def _border(run: LoadedRun) -> str:
    """What timm's transform does otherwise than the run did, as a paragraph; nothing where they agree."""
    return f"{BORDERS}\n\n" if run.preprocessing.fit is Fit.pad else ""
