# Sourced by the launch scripts: their help, and checks of their flags.

# head_of SCRIPT: the comment at its head, without the marks. It is what --help prints.
head_of() {
  local line
  {
    read -r line # the interpreter
    while read -r line && [[ "$line" == "#"* ]]; do
      line="${line#\#}"
      printf '%s\n' "${line# }"
    done
  } <"$1"
}

# refuse SCRIPT MESSAGE...: bad input, in one line.
refuse() {
  local script="$1"
  shift
  printf '%s: %s\n' "$script" "$*" >&2
  exit 2
}

# check_flag SCRIPT FLAG: what is written into a job script or a manifest is one line of it.
check_flag() {
  if [[ "$2" == *[[:cntrl:]]* ]]; then refuse "$1" "$(printf '%q' "$2"): a line break or control character in a flag"; fi
}

# check_numbers SCRIPT NAME...: variables that hold whole numbers.
check_numbers() {
  local script="$1" name
  shift
  for name in "$@"; do
    [[ "${!name}" =~ ^[0-9]+$ ]] || refuse "$script" "$name is a whole number, not '${!name}'"
  done
}

# tpu_flags SCRIPT NAME: the flags of libtpu in launch/tpu_flags/NAME.txt, on one line; nothing without a name.
tpu_flags() {
  [[ -n "$2" ]] || return 0
  local file="launch/tpu_flags/$2.txt" known
  known="$(cd launch/tpu_flags && printf '%s\n' *.txt | sed 's/\.txt$//' | paste -sd ' ')"
  [[ "$2" != */* && -f "$file" ]] || refuse "$1" "--flags=$2: there are $known"
  grep -v '^#' "$file" | paste -sd ' '
}
