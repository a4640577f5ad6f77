set -e
git init -q -b main . && git config user.name someone && git config user.email someone@example.org
echo '# Project' > README && git add . && git commit -qm start
git checkout -qb ideas
printf 'first idea: %s\n' "$(echo seed | sha256sum | cut -c1-16)" > notes.txt && git add . && git commit -qm notes
for i in 1 2 3; do
    printf 'idea %s: %s\n' $i "$(echo $i | sha256sum | cut -c1-16)" >> notes.txt && git commit -qam "more $i"
done
git checkout -q main && git branch -qD ideas
echo 'Work goes on.' >> README && git commit -qam 'go on'
