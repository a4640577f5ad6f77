#!/bin/bash
cd /app/site || exit 1
find . -type d -exec chmod 750 {} +
find . -type f -exec chmod 640 {} +
find . -type f | while IFS= read -r file; do
    [[ $(head -c 2 "$file") == '#!' ]] && chmod 750 "$file"
done
chmod -R g= private
