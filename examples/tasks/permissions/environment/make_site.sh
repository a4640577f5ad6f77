set -e
mkdir -p 'site/bin' 'site/pages/old pages' site/private/keys
echo hello > site/pages/index.html && echo old > 'site/pages/old pages/a page.html'
printf '#!/bin/bash\necho deployed\n' > site/bin/deploy && printf '#!/bin/sh\necho key\n' > site/private/rotate
echo '# not a program' > site/bin/README && echo secret > site/private/keys/id && echo x > site/.hidden
chmod -R a+rwX site && chmod 777 site/bin/README && chmod 604 site/pages/index.html && chmod 4755 site/bin/deploy
