#!/bin/bash
cd /app || exit 1
cat > Makefile <<'END'
CHAPTERS = $(sort $(wildcard chapters/*.txt))
COUNTS = $(CHAPTERS:chapters/%.txt=build/%.count)

all: build/index.txt

build/index.txt: $(COUNTS)
	cat $^ > $@
	awk '{ n += $$2 } END { print "total: " n " words" }' $^ >> $@

build/%.count: chapters/%.txt
	mkdir -p build
	echo "$*: $$(wc -w < $<) words" > $@

clean:
	rm -rf build
END
make
