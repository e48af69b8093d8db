#!/bin/sh
# The images' entry point. Root, as which `docker run` starts without --user, becomes the owner of the
# folder mounted at /app, so that no file there is root's, in the groups that a Jetson's GPU is open to.
# A folder of root's own, or none, and it stays root.
set -eu
if [ "${KEY_ON_STDIN:-}" = 1 ]; then # where `docker inspect` does not show it
  IFS= read -r WANDB_API_KEY
  export WANDB_API_KEY
  unset KEY_ON_STDIN
fi
owner=$(stat -c %u /app)
if [ "$(id -u)" = 0 ] && [ "$owner" != 0 ]; then
  groups=$(stat -c %g /app /dev/nvmap /dev/dri/renderD* 2>/dev/null | paste -sd , -)
  set -- setpriv --reuid "$owner" --regid "${groups%%,*}" --groups "$groups" "$@"
fi
exec "$@"
