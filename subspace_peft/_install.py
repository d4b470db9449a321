"""How to install this package: said once, in the words of cards and errors.

No package index has it yet. When one does, these two texts become ``pip install subspace-peft`` and the same with
``-U``. Extras are said as ``pip install "subspace-peft[report]"`` wherever they are needed: where the package is
installed, pip takes them from what is installed, and asks no index for it.
"""

INSTALL = "install it from a checkout, `pip install .`, or from a wheel of it, `pip install subspace_peft-….whl`"
UPGRADE = "install a newer one from a checkout, `pip install .`, or from a wheel of it"
