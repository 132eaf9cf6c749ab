// Package uverbs is the system-call door to the kernel's RDMA devices: it opens /dev/infiniband/uverbsN and marshals
// commands. It knows the commands' form, not their meaning: that is the providers'.
//
// There is one marshaller, the ioctl's (RDMA_VERBS_IOCTL): native methods where the kernel has them, and INVOKE_WRITE,
// which carries the older write() commands, for everything else. Unlike write() it is not tied to the credentials that
// the file was opened with. write() itself remains as the fallback for kernels whose ioctl does not know INVOKE_WRITE.
package uverbs
