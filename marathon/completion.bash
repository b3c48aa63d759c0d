_marathon() {
  local words word
  # Readline breaks words at = and : too; the line is taken as the command gets it.
  IFS=' ' read -ra words <<<"${COMP_LINE:0:COMP_POINT}."
  word=${words[-1]%.}
  local IFS=$'\n'
  COMPREPLY=($(marathon _complete "${words[@]:1:${#words[@]}-2}" "$word"))
  # It completes only what stands behind the =.
  [[ $word == *=* ]] && COMPREPLY=("${COMPREPLY[@]#"${word%%=*}="}")
  [[ ${COMPREPLY[0]} == *= ]] && compopt -o nospace
}
complete -o default -F _marathon marathon
