#!/bin/bash
check() { [[ $(cat /app/answer.txt) == "10.0.0.3 23210" ]]; }
if check; then reward=1; else reward=0; fi
echo $reward > /logs/verifier/reward.txt
