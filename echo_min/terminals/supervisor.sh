# Takes orders on stdin, answers on stdout. At EOF, as the host closed the pipe or died, it ends and, being
# pid 1, takes all else along. (Not --die-with-parent: that fires when the THREAD which started bwrap ends.)
# Job control (set -m) makes inner bwrap and relay one process group; SIGURG means nothing but to the relay.
set -m; umask 022; shopt -s dotglob nullglob; exec 2>/dev/null
traffic() {  # -> sent: what the network has counted, and can't be made to forget
    local file text; sent=
    for file in dev snmp snmp6 netstat; do IFS= read -r -d '' text </proc/net/$file; sent+=$text; done
}
traffic; unused=$sent
while IFS= read -r -d '' order; do
    case $order in
    files\ *)  # a script, then what it reads; if it fails, the rest of that would pass for orders
        length=${order#files } files=
        ((length == 0)) || read -r -N $length files
        (eval "$files"); code=$?
        echo $code; ((code == 0)) || exit ;;
    start)
        exec {filter}</opt/filter  # a number that is free, whatever numbers the pipes have
        # The relay can fork when the agent no longer can.
        (ulimit $limits -u $((processes + 8)); unset SHLVL
            exec $inner --seccomp $filter $relay <&$requests >&$status 2>&$output \
                {requests}<&- {status}>&- {output}>&-) &
        exec {filter}<&- ;;
    late) kill -URG -- -$! && echo sent || echo gone ;;
    verify\ *)
        read -r -N ${order#verify } verifier
        # -u counts the agent's processes too. By stdin: a command line holds 128 KiB. No startup file nor module
        # of the agent's is read unasked.
        (ulimit -c 0 -v $memory -u $((2 * processes + 8))
            HOME=/tmp PYTHONSAFEPATH=1 exec {requests}<&- {status}>&- {output}>&- bash --norc --noprofile -c \
                'IFS= read -r -d "" script; eval "$script"' <<<"$verifier"
        ) &>/dev/null
        echo $? ;;
    clear)  # whatever is left of the episode; what can't be removed shows in the answer
        for ((try = 0, left = 2; left > 1 && try < 5000; try++)); do
            kill -KILL -- -1
            wait
            list=(/proc/[0-9]*) left=${#list[@]}
            ((left == 1)) || read -r -t 0.001 -N 1  # nothing comes: a nap without a fork
            ((try % 20 == 19)) && (:)  # `wait` now and then misses an orphan's end; after a fork bash sees it
        done
        chmod 00755 /work  # five digits, or else the special bits stay
        touch /work
        list=(/work/* /tmp/*)
        ((${#list[@]} == 0)) || rm -rf -- "${list[@]}"
        list=(/work/* /tmp/*)
        traffic; [[ $sent == "$unused" ]] || list+=(sent)
        echo $left ${#list[@]} ;;
    esac
done
