// CPU kernel of `route`: to be written for the schema of ../route.h. Until then the plain PyTorch reference runs.
#include "../route.h"
