# Takes commands on stdin, answers on stdout; what was stderr becomes the commands' output. `limits` are the
# commands' own, beside those it has itself. Only builtins: a fork costs half a command.
# Job control here, or else bash would start a command in the background with SIGINT ignored.
set -m; exec 3>&2 2>/dev/null
trap late=late URG
reap() {  # stop all that the command started, lest parents report killed children; then kill until none lives
    local signal found process line
    for ((signal = 19, found = 1; found; signal = 9)); do
        found=0
        for process in /proc/[0-9]*; do
            [[ $before == *" $process "* ]] && continue
            read -r line <$process/stat && [[ ${line##*)} != ' Z'* ]] || continue
            kill -$signal ${process#/proc/} && found=1
        done
    done
}
echo "${mark}ready"
while IFS= read -r -d '' command; do
    list=(/proc/[0-9]*) late=
    before=" ${list[*]} "
    { ulimit $limits && exec -a bash /bin/bash -c -- "$command"; } </dev/null >&3 2>&3 3>&- &
    # `wait` also returns when the command stops itself, or for a signal that came just after the last one; only
    # then -f: with it, bash 5.2 now and then misses the end of a short command and waits on for ever
    force=; while wait $force $!; code=$?; [[ ! $late ]] && kill -0 $!; do force=-f; done
    if [[ $late ]]; then reap; fi
    list=(/proc/[0-9]*)  # so many that the next command would have no room? then none may stay
    if ((${#list[@]} > processes / 2 + 1)); then before=' /proc/1 ' && reap; fi
    echo "$mark${late:-$code}"
done
