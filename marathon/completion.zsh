_marathon() {
  local -a found; found=(${(f)"$(marathon _complete "${(@)words[2,CURRENT]}")"})
  (( $#found )) && compadd -S '' -- $found || _files
}
compdef _marathon marathon
