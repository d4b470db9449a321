"""What whole cards look like: regular expressions over them; a line that ends in a backslash goes on in the next."""

REMEDY = (
    r"`KeyError: 'SUBSPACE'` means that the process has not imported `subspace_peft`: install it from a checkout,"
    r" `pip install \.`, or from a wheel of it, `pip install subspace_peft-….whl`, and "
    r"`import subspace_peft` before loading; a stock script runs unchanged with `subspace-peft run script\.py`\."
)
FURTHER = (
    r"- to train it further: a learning rate of about 3e-3, as in `TrainingArguments\(\"out\", learning_rate=3e-3\)`; the"
    r" Trainer's default, 5e-5, is too low"
)
BEGIN, END = r"<!-- subspace_peft: begin -->", r"<!-- subspace_peft: end -->"

BASIS = rf"""---
base_model: org/base
library_name: peft
tags:
- subspace
- subspace-basis
---

{BEGIN}
<!-- front matter: base_model=\w{{8}} library_name=\w{{8}} -->
# basis

A frozen basis for 12 modules \(k=16\) of `org/base`, for subspace_peft\. 24,576 frozen parameters, stored once; a task in it trains \
3,072 parameters with the default `core` coefficients\.

- fingerprint: `f{{64}}`
- builder: `adapters`
- saved by subspace_peft 9\.9

## Use

```python
import subspace_peft  # registers the SUBSPACE method with PEFT
from peft import get_peft_model
from transformers import TrainingArguments
from transformers import AutoModelForCausalLM

base_model = AutoModelForCausalLM\.from_pretrained\("org/base"\)
config = subspace_peft\.SubspaceConfig\(
    basis="org/basis",
    basis_fingerprint="f{{64}}",
    task_type="CAUSAL_LM",
\)
model = get_peft_model\(base_model, config\)
model\.print_trainable_parameters\(\)
args = TrainingArguments\("out", learning_rate=3e-3\)  # the default, 5e-5, is too low for coefficients
```

{REMEDY}

## Energy kept

\|  \| share of the sources' energy \|
\| --- \| --- \|
\| this basis \| 93\.0 % \|
\| a basis of the others, of a source left out \| 5\.6 % \|
\| a random basis of equal size \(expected\) \| 0\.2 % \|

Energy is the squared Frobenius norm of an adapter's update\. It is not usefulness: compare with a random basis on your own task before relying on it\.

<details><summary>By module</summary>

\| module \| kept \| of a source left out \| random basis \|
\| --- \| --- \| --- \| --- \|
\| `a\.q` \| 95\.0 % \| 6\.0 % \| 0\.2 % \|
\| `a\.v` \| 91\.0 % \|  \| 0\.2 % \|

</details>

## Sources

\| source \| from \| revision \| ranks \| norm of ΔW \| energy kept \| licence \| sha256 \|
\| --- \| --- \| --- \| --- \| --- \| --- \| --- \| --- \|
\| one \| `org/one` \| `a{{12}}` \| 8 \| 1\.235 \| 95\.0 % \| apache-2\.0 \| `b{{12}}` \|
\| two\\\|2 \| `loras/two` \|  \| 4, 8 \| 2 \|  \|  \| `c{{12}}` \|

## Left out

\| source \| why \|
\| --- \| --- \|
\| bad \| it is truncated \|
{END}
"""

TASK = rf"""---
base_model: org/base
datasets:
- org/data
library_name: peft
pipeline_tag: text-classification
tags:
- bert
- subspace
- subspace-factor
- subspace-task
base_model_relation: adapter
model-index:
- name: task
  results:
  - task:
      type: text-classification
    dataset:
      name: org/data
      type: org/data
    metrics:
    - type: accuracy
      value: 0\.875
  - task:
      type: text-classification
    dataset:
      name: org/data
      type: org/data
      split: test
    metrics:
    - type: accuracy
      value: 0\.85
---

{BEGIN}
<!-- front matter: base_model=\w{{8}} base_model_relation=\w{{8}} datasets=\w{{8}} library_name=\w{{8}} model-index=\w{{8}} \
pipeline_tag=\w{{8}} -->
# task

A task of `org/base` in a shared, frozen basis, for PEFT with subspace_peft: 3,072 trained parameters \(`factor` coefficients\), 771 more \
of modules trained whole, 16,384 bytes\.

## Loading

```python
import subspace_peft  # registers the SUBSPACE method with PEFT
from peft import PeftModel
from transformers import AutoModelForSequenceClassification

base_model = AutoModelForSequenceClassification\.from_pretrained\("org/base", revision="v1", \
id2label=\{{0: 'no', 1: 'yes', 2: '"so-so"'\}}, ignore_mismatched_sizes=True\)
model = PeftModel\.from_pretrained\(base_model, "me/task", revision="dev"\)
```

{REMEDY}

## Basis and coefficients

- basis: `org/basis` at revision `abc`; loading finds and verifies it
- fingerprint: `f{{64}}`
- coefficients: `factor`, mean gain `none`, start `zero`
{FURTHER}
- saved by subspace_peft 9\.9, PEFT 9\.8

## Training

\|  \|  \|
\| --- \| --- \|
\| learning rate of the coefficients \| 0\.004 \|
\| epochs \| 3 \|
\| optimizer steps \| 1,200 \|
\| training loss \| 0\.4321 \|

## Metrics

\| on \| metric \| value \|
\| --- \| --- \| --- \|
\| evaluation \| loss \| 0\.5 \|
\| evaluation \| accuracy \| 0\.875 \|
\| test \| accuracy \| 0\.85 \|

## Beside its controls

data: accuracy on 600 test examples

\| method \| test accuracy \| seeds \| trained \(adapter\) \| trained \(head\) \| adapter bytes \| learning rate \|
\| --- \| --- \| --- \| --- \| --- \| --- \| --- \|
\| base model \| 0\.500 \| 1 \| 0 \| 0 \| 0 \| – \|
\| random basis \| 0\.785 ± 0\.017 \| 3 \| 1,536 \| 770 \| 7,216 \| 0\.004 \|
\| this basis \| diverged in 1 of 3 \| 3 \| 1,536 \| 770 \| 7,216 \| 0\.012 \|

Every row was trained from scratch .* not from the parameters in this file\.
{END}
"""

BARE_TASK = rf"""---
library_name: peft
tags:
- subspace
- subspace-core
- subspace-task
---

{BEGIN}
<!-- front matter: library_name=\w{{8}} -->
# task

A task of a base model that was not recorded in a basis of its own, for PEFT with subspace_peft\.

## Loading

```python
import subspace_peft  # registers the SUBSPACE method with PEFT
from peft import PeftModel

# base_model: the base model, a MyModel, as you load it
model = PeftModel\.from_pretrained\(base_model, "/somewhere/task"\)
```

{REMEDY}

## Basis and coefficients

- basis: in this file
- coefficients: `core`, mean gain `none`, start `zero`
{FURTHER}
{END}
"""

BUNDLE = rf"""---
base_model: org/base
datasets:
- org/data
library_name: peft
pipeline_tag: text-generation
tags:
- bert
- subspace
- subspace-bundle
- subspace-core
- subspace-diagonal
base_model_relation: adapter
---

{BEGIN}
<!-- front matter: base_model=\w{{8}} base_model_relation=\w{{8}} datasets=\w{{8}} library_name=\w{{8}} pipeline_tag=\w{{8}} -->
# bundle

2 tasks of `org/base` in one shared, frozen basis, 4,096 bytes, for PEFT with subspace_peft\.

## Loading

```python
import subspace_peft  # registers the SUBSPACE method with PEFT
from somewhere import load
from transformers import AutoModelForCausalLM

base_model = AutoModelForCausalLM\.from_pretrained\("org/base"\)
model = load\(base_model, "me/bundle"\)
```

{REMEDY}

## Basis

- basis: `org/basis`; loading finds and verifies it
- fingerprint: `f{{64}}`
- saved by subspace_peft 9\.9

## Tasks

\| task \| coefficients \| parameters \| metrics \| datasets \|
\| --- \| --- \| --- \| --- \| --- \|
\| `first` \| `core` \| 1,024 \| accuracy 0\.9, loss 0\.3333 \| org/data \|
\| `second` \| `diagonal` \|  \|  \|  \|
{END}
"""

BASIS, TASK, BUNDLE = (pattern.replace("\\\n", "") for pattern in (BASIS, TASK, BUNDLE))
