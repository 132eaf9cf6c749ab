// Package netlink talks to the kernel over netlink sockets, as far as RDMA devices and the net devices below them need it:
// one request at a time, attributes, acknowledgements with the kernel's own words.
package netlink
