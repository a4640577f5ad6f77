# Takes orders on stdin, answers on stdout. At EOF, as the host closed the pipe or died, it ends and, being
# pid 1, takes all else along. (Not --die-with-parent: that fires when the THREAD which started bwrap ends.)
# Job control (set -m) makes inner bwrap and relay one process group; SIGURG means nothing but to the relay.
set -m; umask 022; exec 2>/dev/null
$inner <&$requests >&$status 2>&$output {requests}<&- {status}>&- {output}>&- &
exec {requests}<&- {status}>&- {output}>&-
while IFS= read -r -d '' order; do
    case $order in
    late) kill -URG -- -$!; echo sent ;;
    verify)
        # -u counts the agent's processes too
        (ulimit -c 0 -v $memory -u $((2 * processes + 8)) && exec timeout -s KILL $seconds \
            bash --norc --noprofile /tmp/verify) </dev/null &>/dev/null
        echo $? ;;
    esac
done
