"""Examples of every verb, which stand below its help; a test parses each, and runs those that need little."""

EXAMPLES: dict[str, tuple[str, ...]] = {
    "build": (
        "subspace-peft build loras/* --out my-basis",
        "subspace-peft build loras/* --dry-run",
        "subspace-peft build loras/* org/mrpc-lora@main --out my-basis -k 32",
        "subspace-peft build --config fleet.yaml --out my-basis",
    ),
    "update": (
        "subspace-peft update my-basis loras/new --out my-basis-2",
        "subspace-peft update my-basis loras/new --out my-basis-2 --tasks my-task --tasks-out tasks-2",
        "subspace-peft update my-basis -k 16 --out small --tasks tasks/* --tasks-out small-tasks --max-drift 0.05",
    ),
    "complete": (
        "subspace-peft complete my-basis -k 32 --out full",
        "subspace-peft complete my-basis -k 32 --with base-weights --base-model base --out full",
    ),
    "migrate": (
        "subspace-peft migrate my-task --basis my-basis-2 --out tasks-2",
        "subspace-peft migrate my-task my-bundle --basis my-basis-2 --out tasks-2 --max-drift 0.05",
    ),
    "continual": (
        "subspace-peft continual run plan.yaml --out my-run",
        "subspace-peft continual status my-run",
    ),
    "continual run": (
        "subspace-peft continual run plan.yaml --out my-run",
        "subspace-peft continual run plan.yaml --out my-run --restart",
    ),
    "continual status": (
        "subspace-peft continual status my-run",
        "subspace-peft continual status my-run --markdown --figure my-run.png",
    ),
    "continual resume": (
        "subspace-peft continual resume my-run",
        "subspace-peft continual resume my-run --json",
    ),
    "record-base": (
        "subspace-peft record-base my-basis --base-model base",
        "subspace-peft record-base my-basis --base-model org/model --force",
    ),
    "inspect": (
        "subspace-peft inspect my-basis",
        "subspace-peft inspect my-task --json",
        "subspace-peft inspect org/my-basis --no-verify",
    ),
    "validate": (
        "subspace-peft validate my-basis",
        "subspace-peft validate my-basis --json",
    ),
    "analyze": (
        "subspace-peft analyze loras/*",
        "subspace-peft analyze loras/* --basis my-basis",
    ),
    "report": (
        "subspace-peft report my-basis",
        "subspace-peft report my-basis --fleet loras/* --out my-report",
    ),
    "project": (
        "subspace-peft project loras/sst2 --basis my-basis",
        "subspace-peft project loras/sst2 --basis my-basis --out sst2-task",
        "subspace-peft project loras/sst2 --basis my-basis --extra-rank 2 --out sst2-task",
    ),
    "export-lora": (
        "subspace-peft export-lora my-task --out my-lora",
        "subspace-peft export-lora my-task --out my-lora --pad-to vllm",
    ),
    "bundle": (
        "subspace-peft bundle create my-task --out my-bundle",
        "subspace-peft bundle ls my-bundle",
    ),
    "bundle create": (
        "subspace-peft bundle create my-task --out my-bundle",
        "subspace-peft bundle create my-task --out my-bundle --dtype bfloat16",
    ),
    "bundle add": (
        "subspace-peft bundle add my-bundle sst2-task",
        "subspace-peft bundle add my-bundle sst2-task --replace",
    ),
    "bundle ls": (
        "subspace-peft bundle ls my-bundle",
        "subspace-peft bundle ls org/my-bundle --verify --json",
    ),
    "bundle extract": (
        "subspace-peft bundle extract my-bundle sst2 --out extracted",
        "subspace-peft bundle extract my-bundle --all --as-lora --out extracted",
    ),
    "compress": (
        "subspace-peft compress loras/* --basis my-basis --out my-bundle",
        "subspace-peft compress loras/* --basis my-basis --out my-bundle --residual 2 --skip-bad",
    ),
    "push": (
        "subspace-peft push my-basis org/my-basis --private",
        "subspace-peft push my-task org/my-task --push-basis-to org/my-basis",
    ),
    "cache": (
        "subspace-peft cache ls",
        "subspace-peft cache verify",
    ),
    "cache ls": (
        "subspace-peft cache ls",
        "subspace-peft cache ls --json",
    ),
    "cache verify": (
        "subspace-peft cache verify",
        "subspace-peft cache verify --json",
    ),
    "cache rm": (
        "subspace-peft cache rm 3fa94b1c",
        "subspace-peft cache rm --all",
    ),
    "demo": (
        "subspace-peft demo",
        "subspace-peft demo --quick --out demo-quick",
    ),
    "cp": (
        "subspace-peft cp",
        "subspace-peft cp glue",
        "subspace-peft cp glue --out my_glue.py",
    ),
    "run": (
        "subspace-peft run train.py --learning_rate 3e-3",
        "subspace-peft run -m trl.scripts.sft --help",
    ),
    "env": (
        "subspace-peft env",
        "subspace-peft env --json",
    ),
    "completion": (
        'eval "$(subspace-peft completion bash)"',
        "subspace-peft completion zsh > ~/.zfunc/_subspace-peft",
    ),
}
