package rpc

import (
	"context"
	"encoding/binary"
	"errors"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
)

func getUint32(b []byte) uint32 { return binary.LittleEndian.Uint32(b) }

var errSizeChanged = errors.New("message changed while it was marshalled")

// marshalInto marshals m, whose size was just computed as len(b), into b.
func marshalInto(b []byte, m proto.Message) error {
	out, err := proto.MarshalOptions{UseCachedSize: true}.MarshalAppend(b[:0], m)
	if err != nil {
		return err
	}
	if len(out) != len(b) {
		return errSizeChanged
	}
	return nil
}

// unmarshal parses b, which is lent, into m, which is kept.
func unmarshal(b []byte, m proto.Message) error {
	return proto.UnmarshalOptions{NoLazyDecoding: true}.Unmarshal(b, m) // lazy fields would keep b
}

// Handle registers a method with a name whose handler takes and returns protobuf messages. The handler runs on a
// worker. The response is marshalled straight into the memory it is sent from. A request that does not parse is
// answered with InvalidArgument; a nil response without an error counts as an empty message.
//
// Handle panics if the name is not valid or is taken.
func Handle[Req, Resp proto.Message](s *Server, name string, h func(ctx context.Context, req Req) (Resp, error)) {
	HandleSpec(s, Spec{Name: name}, h)
}

// HandleSpec is Handle for a method with a number, or one that runs inline.
func HandleSpec[Req, Resp proto.Message](s *Server, spec Spec, h func(ctx context.Context, req Req) (Resp, error)) {
	newReq := messageType[Req]()
	s.HandleRaw(spec, func(c *Call, b []byte) error {
		req := newReq.New().Interface().(Req)
		if err := unmarshal(b, req); err != nil {
			return badRequest(err)
		}
		resp, err := h(c.Context(), req)
		if err != nil {
			return err
		}
		return replyMessage(c, resp)
	})
}

// HandleReuse is HandleSpec for handlers that keep neither req nor resp when they return: both messages are used again,
// so that a call on messages of scalar fields allocates only its context. resp is empty when h is called.
func HandleReuse[Req, Resp proto.Message](s *Server, spec Spec, h func(ctx context.Context, req Req, resp Resp) error) {
	newReq, newResp := messageType[Req](), messageType[Resp]()
	type pair struct {
		req  Req
		resp Resp
	}
	free := make(chan pair, 64)
	s.HandleRaw(spec, func(c *Call, b []byte) error {
		var p pair
		select {
		case p = <-free:
		default:
			p = pair{newReq.New().Interface().(Req), newResp.New().Interface().(Resp)}
		}
		if err := unmarshal(b, p.req); err != nil { // resets p.req first
			return badRequest(err)
		}
		proto.Reset(p.resp)
		err := h(c.Context(), p.req, p.resp)
		if err == nil {
			err = replyMessage(c, p.resp)
		}
		select {
		case free <- p: // not reached if h panics: the messages may be in anybody's hands
		default:
		}
		return err
	})
}

// messageType returns the type behind M, a pointer to a generated message.
func messageType[M proto.Message]() protoreflect.MessageType {
	var zero M
	if any(zero) == nil {
		panic("rpc: a handler's message types must be generated message types, not the interface proto.Message")
	}
	return zero.ProtoReflect().Type()
}

func badRequest(err error) error {
	return &Error{Code: InvalidArgument, Message: "request: " + err.Error(), cause: err}
}

func replyMessage(c *Call, resp proto.Message) error {
	b, err := c.Reply(proto.Size(resp))
	if err != nil {
		return err
	}
	if err := marshalInto(b, resp); err != nil {
		return &Error{Code: Internal, Message: "response: " + err.Error(), cause: err}
	}
	return nil
}

// Invoke calls the method with a name and returns its response as a new message:
//
//	resp, err := rpc.Invoke[*wrapperspb.StringValue](ctx, client, "greeter.Greeter/Hello", req)
func Invoke[Resp proto.Message](ctx context.Context, c *Client, name string, req proto.Message) (Resp, error) {
	resp := messageType[Resp]().New().Interface().(Resp)
	if err := c.Call(ctx, name, req, resp); err != nil {
		var none Resp
		return none, err
	}
	return resp, nil
}
