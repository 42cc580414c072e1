// The few shims of a CUDA torch become weak, so that the library also loads, and registers, with a CPU torch.
#pragma once

#pragma weak aoti_torch_get_current_cuda_stream
#pragma weak torch_c10_cuda_check_msg
#pragma weak torch_c10_cuda_free_error_msg
