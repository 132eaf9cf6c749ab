package main

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"path/filepath"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/protobuf/types/known/wrapperspb"
)

// The grpc-go side is what its users write: a unary method with a protobuf message, default options. The service
// description is what protoc-gen-go-grpc generates, written by hand to do without protoc.

const grpcEchoMethod = "/bench.Echo/Echo"

type echoServer interface {
	Echo(context.Context, *wrapperspb.BytesValue) (*wrapperspb.BytesValue, error)
}

type echoService struct{}

func (echoService) Echo(_ context.Context, in *wrapperspb.BytesValue) (*wrapperspb.BytesValue, error) {
	return &wrapperspb.BytesValue{Value: in.Value}, nil
}

var echoDesc = grpc.ServiceDesc{
	ServiceName: "bench.Echo",
	HandlerType: (*echoServer)(nil),
	Methods: []grpc.MethodDesc{{
		MethodName: "Echo",
		Handler: func(srv any, ctx context.Context, dec func(any) error, interceptor grpc.UnaryServerInterceptor) (any, error) {
			in := new(wrapperspb.BytesValue)
			if err := dec(in); err != nil {
				return nil, err
			}
			if interceptor == nil {
				return srv.(echoServer).Echo(ctx, in)
			}
			return interceptor(ctx, in, &grpc.UnaryServerInfo{Server: srv, FullMethod: grpcEchoMethod},
				func(ctx context.Context, req any) (any, error) {
					return srv.(echoServer).Echo(ctx, req.(*wrapperspb.BytesValue))
				})
		},
	}},
}

type grpcServerArgs struct{ Network string }

func grpcServer(raw json.RawMessage) error {
	var a grpcServerArgs
	if err := json.Unmarshal(raw, &a); err != nil {
		return err
	}
	addr := net.JoinHostPort(listenHost(), "0")
	if a.Network == "unix" {
		dir, err := os.MkdirTemp("", "ringside-bench")
		if err != nil {
			return err
		}
		defer os.RemoveAll(dir)
		addr = filepath.Join(dir, "echo.sock")
	}
	l, err := net.Listen(a.Network, addr)
	if err != nil {
		return err
	}
	s := grpc.NewServer()
	s.RegisterService(&echoDesc, echoService{})
	go s.Serve(l)
	say("addr", l.Addr().String())
	return serveUsage()
}

func grpcClient(raw json.RawMessage) error {
	var a echoArgs
	if err := json.Unmarshal(raw, &a); err != nil {
		return err
	}
	target := "passthrough:///" + a.Addr
	if a.Network == "unix" {
		target = "unix:" + a.Addr
	}
	conn, err := grpc.NewClient(target, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return err
	}
	defer conn.Close()
	payload := make([]byte, a.Size)
	return blockingLoad(&a, func() error {
		out := new(wrapperspb.BytesValue)
		if err := conn.Invoke(context.Background(), grpcEchoMethod, &wrapperspb.BytesValue{Value: payload}, out); err != nil {
			return err
		}
		if len(out.Value) != a.Size {
			return fmt.Errorf("echo of %d bytes has %d", a.Size, len(out.Value))
		}
		return nil
	})
}
