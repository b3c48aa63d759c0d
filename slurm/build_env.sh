#!/bin/bash
# Builds an environment with what Marathon needs beside the torch of a container, without ever replacing that torch.
#
#   slurm/build_env.sh IMAGE.sif ENV.sqsh   on a login node; jobs want the two as MARATHON_CONTAINER and MARATHON_SQSH
#   slurm/build_env.sh none DIR             over the python3 on PATH, or over MARATHON_PYTHON; no container
#
# The container's torch knows the machine's fabric and drivers; a wheel from an index does not, and falls back to TCP.
# Marathon itself is not installed: jobs run the checkout they were submitted from.
set -euo pipefail

MARATHON_HOME=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

stop() {
    printf 'error: %s\n  rule:   %s\n  repair: %s\n' "$@" >&2
    exit 1
}

# A squashfs is one file to Lustre, however many thousand it holds.
build_in_image() {
    local image=$1 out=$2
    [ -e "$image" ] || stop "$image is not there" "the environment is built inside the image it is for" \
        "give the path of a .sif, or none"
    command -v mksquashfs >/dev/null || stop "no mksquashfs here" "it packs the environment into one file" \
        "build on a login node that has it, or in a job"
    folder=$(mktemp -d)
    trap 'rm -rf "$folder"' EXIT
    # Built where jobs will see it, because a virtual environment remembers its own path.
    singularity exec -B "$MARATHON_HOME" -B "$folder:/user-software" "$image" \
        bash "$MARATHON_HOME/slurm/build_env.sh" none /user-software
    mksquashfs "$folder" "$out" -processors 1 -no-xattrs -noappend -quiet
}

build_here() {
    local python=${MARATHON_PYTHON:-python3} folder=$1 needs constraints before after
    needs=$(mktemp) constraints=$(mktemp)
    before=$(where_is_torch "$python")
    [ -n "$before" ] || stop "$python has no torch" "the environment lies over a Python that brings its own torch" \
        "an image with PyTorch inside, or MARATHON_PYTHON=<a Python with torch>"
    "$python" -m venv --system-site-packages "$folder"
    # The venv of a venv does not see the packages of the first: NeMo images keep torch in one.
    "$python" -c "$print_packages" >"$("$folder/bin/python" -c "$print_packages")/beneath.pth"
    "$folder/bin/python" -c "$read_needs" "$MARATHON_HOME/pyproject.toml" "$needs" "$constraints"
    "$folder/bin/python" -m pip install --disable-pip-version-check --no-cache-dir -r "$needs" -c "$constraints" >&2 ||
        stop "pip could not install what pyproject.toml names beside torch $before" \
            "the torch of the container stays as it is: $(paste -sd ' ' "$constraints")" \
            "read pip's message above: another image, or a version of the package in conflict that accepts this torch"
    after=$(where_is_torch "$folder/bin/python")
    [ "$after" = "$before" ] || stop "torch was $before and is $after" "the torch of the container stays as it is" \
        "delete $folder and report this as an error of slurm/build_env.sh"
    rm "$needs" "$constraints"
    echo "$folder is ready: torch $after"
}

where_is_torch() {
    "$1" -c 'from importlib.metadata import distribution
torch = distribution("torch")
print(torch.version, torch.locate_file("torch"))' 2>/dev/null || true
}

print_packages='import sysconfig; print(sysconfig.get_path("purelib"))'

# Writes what pyproject.toml needs, and as constraints all that was built for this machine: the torch family by name,
# and whatever has a local version such as +rocm7.0 or +nv25.10, which no index carries.
read_needs='
import re, sys, tomllib
from importlib.metadata import distributions
from pathlib import Path
from pip._vendor.packaging.requirements import Requirement

pyproject, needs, constraints = map(Path, sys.argv[1:])
lines = tomllib.loads(pyproject.read_text())["project"]["dependencies"]
installed = {}
for found in distributions():
    installed.setdefault(re.sub("[-_.]+", "-", found.metadata["Name"]).lower(), found.version)
family = re.compile("torch.*|(pytorch-)?triton.*|flash-attn.*|apex|transformer-engine.*|xformers|amdsmi|nvidia-.*")
kept = {name: version for name, version in installed.items() if family.fullmatch(name) or "+" in version}
for need in map(Requirement, lines):
    if need.name == "torch" and not need.specifier.contains(installed["torch"], prereleases=True):
        text = "torch " + installed["torch"]
        sys.exit(f"error: {text} is installed\n  rule:   Marathon needs {need}\n  repair: an image with such a torch")
needs.write_text("\n".join(lines) + "\n")
constraints.write_text("".join(f"{name}=={version}\n" for name, version in sorted(kept.items())))
'

case $# in
2) ;;
*)
    echo "usage: slurm/build_env.sh IMAGE.sif ENV.sqsh | none DIR" >&2
    exit 2
    ;;
esac
if [ "$1" = none ]; then
    build_here "$2"
else
    build_in_image "$1" "$2"
fi
