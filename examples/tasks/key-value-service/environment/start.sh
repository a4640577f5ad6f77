#!/bin/bash
python3 /srv/service.py &
exec "$@"
