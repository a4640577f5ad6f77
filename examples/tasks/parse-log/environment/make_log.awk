# A log from a linear congruential generator: the same everywhere.
function draw(n) { state = state * 16807 % 2147483647; return int(state / 2147483647 * n) }
BEGIN {
    state = 77
    for (i = 0; i < 8000; i++) {
        seconds = int(i * 10.75); status = draw(10) < 7 ? 200 : draw(2) ? 404 : 500 + draw(4)
        printf "10.0.%d.%d - - [12/Mar/2024:%02d:%02d:%02d +0000] \"GET /item/%d HTTP/1.1\" %d %d\n", \
            draw(3), 1 + draw(6), seconds / 3600, seconds / 60 % 60, seconds % 60, 500 + draw(500), status, draw(9000)
    }
}
