// Package rpc makes calls between two processes over a transport.Conn.
//
// A Server has methods, numbered or named, with two kinds of handler: raw ones take and return bytes in the memory that
// the transport receives into and sends from, with no copy either way; typed ones take and return protobuf messages that
// are parsed and marshalled there. A Client makes calls from any number of goroutines, or many from one with a Queue.
// Deadlines and cancellation travel, errors carry gRPC's codes and details, and bulk arguments are regions of the
// client's memory that the handler reads and writes one-sided.
//
// # Who owns which bytes, from when, until when
//
//   - A request given to a Client is copied into a send slot before the call waits (CallRaw, Queue.Start), or written there
//     by the caller's function (CallFunc, Queue.StartFunc) or by protobuf. The caller's memory is its own again at once,
//     also when a call is canceled: what the network device still reads is the transport's slot.
//   - The request that a handler sees is the receive slot itself, lent until the handler returns. Requests beyond the
//     number of slots that calls may hold are copied, so that a connection cannot fill up with slow calls.
//   - Call.Reply hands out the send slot that the response leaves in. It belongs to the transport once the handler has returned.
//   - The response that a client's function sees is the receive slot (a copy, if it is small), lent until the function
//     returns. The response of a call that was given up finds no call and is dropped.
//   - A region passed as Bulk may be touched by the server until CallBulk returns, and not after.
//
// # Load
//
// Inline handlers run one after the other on the polling goroutine. Others run on ServerConfig.MaxConcurrent workers;
// ServerConfig.MaxQueue requests more wait, and what comes on top is refused at once with ResourceExhausted, not
// executed; so are requests over ServerConfig.MaxQueueBytes. Below that limit the transport's credits hold back a client
// that sends faster than the server takes. A client that takes no responses is cut off after ServerConfig.StallTimeout.
package rpc
