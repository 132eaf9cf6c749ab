// Package readiness waits for a descriptor by the Go runtime's poller, without the descriptor being one of it: the runtime would wake
// a thread for whatever comes, whether somebody waits or not. Waiting is done on an epoll descriptor that looks at the other one only
// while it is asked to. On Linux only.
package readiness
