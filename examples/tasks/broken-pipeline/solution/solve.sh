#!/bin/bash
cat > /app/top.sh <<'END'
#!/bin/bash
tr A-Z a-z < "$1" | tr -cs a-z '\n' | grep . | sort | uniq -c | sort -k1,1nr -k2 | head -n 3 | sed 's/^ *//'
END
bash /app/top.sh /app/sample.txt
