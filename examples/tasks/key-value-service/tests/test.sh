#!/bin/bash
# The service alone knows what the values were; nobody but root can write what it is.
exec 3<>/dev/tcp/127.0.0.1/7000 && echo swapped >&3 && read -r -t 5 answer <&3
echo "the service says: $answer"
if [[ $answer == True ]]; then reward=1; else reward=0; fi
echo $reward >/logs/verifier/reward.txt
